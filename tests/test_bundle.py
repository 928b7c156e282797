"""Bundles: what is in them, that both runners give the module's bits, and what they refuse."""

import hashlib
import platform
import shutil
import subprocess
import sys
import zipfile

import models
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import tvm_qfp8
from tvm_qfp8.bundling.runtime_libraries import _extract
from tvm_qfp8.cpu_features import HWCAP, Feature, missing_features, reported_features, used_features
from tvm_qfp8.errors import ModelError, TargetError
from tvm_qfp8.linker import linker
from tvm_qfp8.runtime import read_metadata
from tvm_qfp8.shared_object import check_library_for, machine_of, needed_libraries
from tvm_qfp8.targets import parse_target

HAS_ZIG = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import ziglang"], capture_output=True).returncode != 0,
    reason="ziglang is not installed; pip install 'tvm-qfp8[board]'",
)
LINUX_X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="written for an x86-64 machine")


def model() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((8, 3, 3, 3), np.float32) * 0.2,
        "d": rng.standard_normal((8, 5), np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["c"], ["s"]),
        helper.make_node("GlobalAveragePool", ["s"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "d"], ["y"]),
        helper.make_node("Softmax", ["y"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 9, 7])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 5]) for n in ("y", "z")],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def samples():
    return [{"x": np.random.default_rng(i).standard_normal((1, 3, 9, 7), np.float32)} for i in range(4)]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(folder with native.so, the module)"""
    folder = tmp_path_factory.mktemp("module")
    module = tvm_qfp8.compile(model(), "x86-64", calibration=samples())
    module.export_library(folder / "native.so")
    return folder, module


@pytest.fixture(scope="module")
def native_bundle(compiled, tmp_path_factory):
    return tvm_qfp8.bundle(compiled[0] / "native.so", tmp_path_factory.mktemp("out") / "bundle", "x86-64")


def run(command, folder):
    return subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True)


@LINUX_X86
def test_metadata_are_read_without_running_the_module(compiled):
    metadata = read_metadata(compiled[0] / "native.so")
    assert metadata["inputs"] == [["x", [1, 3, 9, 7], "float32"]]
    assert metadata["outputs"] == [["y", [1, 5], "float32"], ["z", [1, 5], "float32"]]


@LINUX_X86
def test_the_python_runner_gives_the_modules_bits(compiled, native_bundle, tmp_path):
    x = samples()[0]["x"]
    np.save(tmp_path / "x.npy", x)
    finished = run([sys.executable, native_bundle / "run.py", "x.npy"], tmp_path)
    assert finished.returncode == 0, finished.stderr
    for index, expected in enumerate(compiled[1].run({"x": x})):
        np.testing.assert_array_equal(np.load(tmp_path / f"output_{index}.npy"), expected)


@LINUX_X86
@pytest.mark.slow
@HAS_ZIG
def test_the_cpp_runner_gives_the_modules_bits(compiled, native_bundle, tmp_path):
    x = samples()[1]["x"]
    np.save(tmp_path / "x.npy", x)
    finished = run([native_bundle / "run", "x.npy"], tmp_path)
    assert finished.returncode == 0, finished.stderr
    for index, expected in enumerate(compiled[1].run({"x": x})):
        np.testing.assert_array_equal(np.load(tmp_path / f"output_{index}.npy"), expected)
    np.save(tmp_path / "wrong.npy", x.astype(np.float64))
    finished = run([native_bundle / "run", "wrong.npy"], tmp_path)
    assert finished.returncode == 1 and "input x is" in finished.stderr


@LINUX_X86
def test_both_runners_take_each_length_of_a_module(tmp_path):
    made = tvm_qfp8.compile(
        models.encoder(), "x86-64", input_shapes={"ids": (1, [8, 12]), "mask": (1, [8, 12])}
    )
    made.export_library(tmp_path / "lengths.so")
    folder = tvm_qfp8.bundle(tmp_path / "lengths.so", tmp_path / "bundle", "x86-64")
    for length in (8, 12):
        given = models.tokens(length)
        for name, array in given.items():
            np.save(tmp_path / f"{name}.npy", array)
        for runner in ([sys.executable, folder / "run.py"], [folder / "run"]):
            if runner[-1].exists():
                finished = run([*runner, "ids.npy", "mask.npy"], tmp_path)
                assert finished.returncode == 0, finished.stderr
                np.testing.assert_array_equal(np.load(tmp_path / "output_0.npy"), made.run(given)[0])
    np.save(tmp_path / "ids.npy", models.tokens(9)["ids"])
    for runner in ([sys.executable, folder / "run.py"], [folder / "run"]):
        if runner[-1].exists():
            finished = run([*runner, "ids.npy", "mask.npy"], tmp_path)
            assert finished.returncode == 1 and "input ids is" in finished.stderr


@LINUX_X86
def test_a_changed_module_is_refused(native_bundle, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(native_bundle, copy)
    with open(copy / "model.so", "r+b") as file:
        file.seek(5000)
        file.write(b"damaged")
    np.save(tmp_path / "x.npy", samples()[0]["x"])
    for runner in ([sys.executable, copy / "run.py"], [copy / "run"]):
        if runner[-1].exists():
            finished = run([*runner, "x.npy"], tmp_path)
            assert finished.returncode == 1
            assert "model.so does not fit manifest.txt" in finished.stderr
    shutil.copyfile(native_bundle / "model.so", copy / "model.so")
    (copy / "lib" / "libtvm_ffi.so").unlink()
    assert "libtvm_ffi.so is missing" in run([sys.executable, copy / "run.py", "x.npy"], tmp_path).stderr
    (copy / "manifest.txt").write_text("format 9\n")
    assert "format 9" in run([sys.executable, copy / "run.py", "x.npy"], tmp_path).stderr


@LINUX_X86
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text.replace("9 7 x", "9 8 x"), "manifest.txt was changed or cut off"),
        (lambda text: text[: text.index("output")], "manifest.txt was changed or cut off"),
        (lambda text: text.replace("end ", "end 0"), "manifest.txt was changed or cut off"),
        (lambda text: text + "input", "manifest.txt was changed or cut off"),
    ],
)
def test_a_changed_manifest_is_refused(native_bundle, tmp_path, change, message):
    copy = shutil.copytree(native_bundle, tmp_path / "copy")
    (copy / "manifest.txt").write_text(change((copy / "manifest.txt").read_text()))
    np.save(tmp_path / "x.npy", samples()[0]["x"])
    for runner in ([sys.executable, copy / "run.py"], [copy / "run"]):
        if runner[-1].exists():
            finished = run([*runner, "x.npy"], tmp_path)
            assert finished.returncode == 1 and message in finished.stderr


@LINUX_X86
def test_a_bundle_says_which_machine_it_is_for(native_bundle, tmp_path):
    copy = shutil.copytree(native_bundle, tmp_path / "copy")
    change_manifest(copy, lambda text: text.replace("target x86_64", "target aarch64"))
    for runner in ([sys.executable, copy / "run.py"], [copy / "run"]):
        if runner[-1].exists():
            finished = run([*runner, "x.npy"], tmp_path)
            assert finished.returncode == 1 and "made for aarch64, this " in finished.stderr


@LINUX_X86
def test_a_bundle_for_another_machine_is_refused(compiled, tmp_path):
    with pytest.raises(TargetError, match="made for x86_64, rpi4 is aarch64"):
        tvm_qfp8.bundle(compiled[0] / "native.so", tmp_path / "b", "rpi4")
    assert not (tmp_path / "b").exists()


def change_manifest(folder, change):
    """Change the manifest's text and its hash with it."""
    text = change((folder / "manifest.txt").read_text().rpartition("end ")[0])
    (folder / "manifest.txt").write_text(text + f"end {hashlib.sha256(text.encode()).hexdigest()}\n")


@LINUX_X86
def test_a_module_for_a_greater_cpu_is_refused(tmp_path):
    module = tvm_qfp8.compile(model(), "znver4")
    module.export_library(tmp_path / "m.so")
    assert {"avx512f", "avx512vnni"} <= set(read_metadata(tmp_path / "m.so")["cpu"]["features"])
    with pytest.raises(TargetError, match="avx512f.*, which x86-64-v3 does not have.*--target x86-64-v3"):
        tvm_qfp8.bundle(tmp_path / "m.so", tmp_path / "b", "x86-64-v3")
    assert not (tmp_path / "b").exists()


@LINUX_X86
def test_a_cpu_without_the_modules_features_is_refused(compiled, native_bundle, tmp_path, monkeypatch):
    copy = shutil.copytree(native_bundle, tmp_path / "copy")
    assert "feature sse2\n" in (copy / "manifest.txt").read_text()
    change_manifest(copy, lambda text: text + "feature avx1024\nfeature nosuch 16 40\nfeature sse2\n")
    np.save(tmp_path / "x.npy", samples()[0]["x"])
    for runner in ([sys.executable, copy / "run.py"], [copy / "run"]):
        if runner[-1].exists():
            finished = run([*runner, "x.npy"], tmp_path)
            message = "compiled for x86-64 and uses avx1024, nosuch, which this CPU does not have"
            assert finished.returncode == 1 and message in finished.stderr
    monkeypatch.setattr("tvm_qfp8.cpu_features.cpuinfo_flags", lambda: {"fpu"})
    with pytest.raises(ModelError, match="uses sse2.*, which this CPU does not have"):
        tvm_qfp8.load(compiled[0] / "native.so")


def test_features_are_read_from_both_places():
    assert missing_features([Feature("avx2"), Feature("avx512f")], {"avx2"}) == ["avx512f"]
    assert missing_features([Feature("avx2")], set()) == []  # no such file
    assert missing_features([Feature("none", HWCAP, 63)], set()) == ["none"]
    names = [f.name for f in reported_features("aarch64", used_features(parse_target("rpi5")))]
    assert {"asimd", "asimddp", "asimdhp"} <= set(names) and "i8mm" not in names
    assert "asimddp" not in [
        f.name for f in reported_features("aarch64", used_features(parse_target("rpi4")))
    ]


def test_wheels_without_the_runtime_are_refused(tmp_path):
    wheel = tmp_path / "apache_tvm.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tvm/lib/libtvm_runtime.so", "")
    with pytest.raises(TargetError, match="hold no libtvm_ffi.so"):
        _extract([wheel], tmp_path / "lib")


def test_what_is_no_module_is_refused(tmp_path):
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(ModelError, match="no shared library"):
        tvm_qfp8.bundle(tmp_path / "text.so", tmp_path / "b")
    with pytest.raises(ModelError, match="no such module"):
        tvm_qfp8.bundle(tmp_path / "missing.so", tmp_path / "b")


@LINUX_X86
def test_a_folder_in_use_is_not_overwritten(compiled, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("keep")
    with pytest.raises(ModelError, match="not empty"):
        tvm_qfp8.bundle(compiled[0] / "native.so", tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["mine.txt"]


@LINUX_X86
def test_a_linker_for_another_machine_is_found_out(compiled, tmp_path):
    module = tvm_qfp8.compile(model(), "rpi4")
    with pytest.raises(TargetError, match=r"linking failed: g\+\+ .*\n"):
        module.export_library(tmp_path / "m.so", fcompile=linker(parse_target("rpi4"), "g++"))
    assert not (tmp_path / "m.so").exists()
    with pytest.raises(TargetError, match="for x86_64, not for aarch64"):
        check_library_for(compiled[0] / "native.so", "aarch64")


def test_a_linkers_options_are_passed_on(tmp_path):
    """A failing one is shown with its whole command line."""
    with pytest.raises(TargetError, match=r"linking failed: false --for-arm -shared .*m\.o\nexit status 1"):
        linker(parse_target("rpi4"), "false --for-arm")(str(tmp_path / "m.so"), ["m.o"])
    with pytest.raises(TargetError, match="no linker 'nosuch -m64' on PATH"):
        linker(parse_target("rpi4"), "nosuch -m64")


@LINUX_X86
@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("g++")), reason="needs cmake and g++")
def test_the_cmake_file_builds_the_runner(compiled, native_bundle, tmp_path):
    copy = shutil.copytree(native_bundle, tmp_path / "copy")
    (copy / "run").unlink(missing_ok=True)
    for command in ("cmake -S cpp -B build", "cmake --build build", "cp build/run ."):
        finished = run(command.split(), copy)
        assert finished.returncode == 0, finished.stderr
    x = samples()[3]["x"]
    np.save(tmp_path / "x.npy", x)
    moved = copy.rename(tmp_path / "moved")
    finished = run([moved / "run", "x.npy"], tmp_path)
    assert finished.returncode == 0, finished.stderr
    for index, expected in enumerate(compiled[1].run({"x": x})):
        np.testing.assert_array_equal(np.load(tmp_path / f"output_{index}.npy"), expected)


@LINUX_X86
@HAS_ZIG
@pytest.mark.slow
def test_a_machine_without_a_compiler_links_by_zig(compiled, tmp_path, monkeypatch):
    monkeypatch.setattr("tvm.support.cc.get_cc", lambda: None)
    compiled[1].export_library(tmp_path / "m.so")
    x = samples()[0]["x"]
    found = tvm_qfp8.load(tmp_path / "m.so").run({"x": x})
    for ours, theirs in zip(compiled[1].run({"x": x}), found, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
@HAS_ZIG
@pytest.mark.parametrize(
    "target, machine",
    [("rpi4", "aarch64"), ("armv7", "armv7l"), ("riscv64", "riscv64"), ("x86-64", "x86_64")],
)
def test_zig_links_every_architecture(target, machine, tmp_path):
    module = tvm_qfp8.compile(model(), target, calibration=samples())
    module.export_library(tmp_path / "m.so")
    assert machine_of(tmp_path / "m.so") == machine
    assert all(name.startswith(("libc.", "libm.", "ld-")) for name in needed_libraries(tmp_path / "m.so"))
    folder = tvm_qfp8.bundle(tmp_path / "m.so", tmp_path / "bundle", target)
    runtime = {path.name for path in (folder / "lib").iterdir()}
    if machine in ("armv7l", "riscv64"):
        assert not runtime and "TVM publishes no runtime" in (folder / "README.md").read_text()
    else:
        assert runtime == {"libtvm_ffi.so", "libtvm_runtime.so"}
        assert machine_of(folder / "run") == machine


@pytest.mark.slow
@pytest.mark.aarch64
@HAS_ZIG
def test_an_aarch64_bundle_runs_under_qemu_with_the_same_bits(tmp_path):
    if shutil.which("qemu-aarch64-static") is None:
        pytest.skip("qemu-aarch64-static is not installed")
    module = tvm_qfp8.compile(model(), "rpi4", calibration=samples())
    module.export_library(tmp_path / "m.so")
    folder = tvm_qfp8.bundle(tmp_path / "m.so", tmp_path / "bundle", "rpi4")
    x = samples()[2]["x"]
    np.save(tmp_path / "x.npy", x)
    command = ["qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu", folder / "run", "x.npy"]
    finished = run(command, tmp_path)
    assert finished.returncode == 0, finished.stderr
    change_manifest(folder, lambda text: text + "feature asimddp 16 20\n")
    old = run([*command[:1], "-cpu", "cortex-a72", *command[1:]], tmp_path)
    assert old.returncode == 1 and "uses asimddp, which this CPU does not have" in old.stderr
    here = tvm_qfp8.compile(model(), "x86-64", calibration=samples())
    for index, expected in enumerate(here.run({"x": x})):
        np.testing.assert_array_equal(np.load(tmp_path / f"output_{index}.npy"), expected)
