"""The command line against a stand-in for the compiler: what is passed on, what is printed, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import tvm_qfp8
from tvm_qfp8.cli import app
from tvm_qfp8.errors import CalibrationError, InputError, ModelError
from tvm_qfp8.report import LayerReport, Report


class StandIn:
    """A compiled module that adds one to its input."""

    inputs = [SimpleNamespace(name="x", shape=(2, 3), dtype="float32")]
    outputs = [SimpleNamespace(name="y")]
    report = Report(target="native", layers=[LayerReport("lv0", "matmul", "QFP8")], notes=["a note"])

    def run(self, inputs):
        if set(inputs) != {"x"}:
            raise InputError(f"input 'x' is missing; found {sorted(inputs)}")
        return [inputs["x"] + 1]

    def export_library(self, path, fcompile=None):
        Path(path).write_bytes(b"library")


@pytest.fixture
def invoke():
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def compiler(monkeypatch):
    """Records the calls of ``tvm_qfp8.compile``; set ``raises`` to make it fail."""
    record = SimpleNamespace(calls=[], raises=None)

    def compile_stand_in(mod, target="llvm", **options):
        options["calibration"] = _listed(options.get("calibration"))
        record.calls.append((mod, target, options))
        options["progress"]("calibrate", 1, 2)
        if record.raises:
            raise record.raises
        return StandIn()

    # Not setattr, which would look the old value up and so import the whole compiler.
    monkeypatch.setitem(vars(tvm_qfp8), "compile", compile_stand_in)
    monkeypatch.setitem(vars(tvm_qfp8), "load", lambda path: StandIn())
    return record


def _listed(calibration):
    return calibration if calibration is None or isinstance(calibration, Path) else list(calibration)


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"onnx")
    return path


def _fails(result, *words):
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ") or "\nerror: " in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.output
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize("command", [(), ("compile",), ("run",), ("bench",), ("report",), ("targets",)])
def test_help_teaches_by_example(invoke, command):
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert "tvm-qfp8 " in result.output


def test_version(invoke):
    assert invoke("--version").output == f"tvm-qfp8 {tvm_qfp8.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("nosuch",),
        ("compile",),
        ("compile", "model.onnx"),
        ("compile", "model.onnx", "-o", "m.so", "--input-shape", "x=1,a"),
        ("compile", "model.onnx", "-o", "m.so", "--input-shape", "1,2"),
        ("compile", "model.onnx", "-o", "m.so", "--max-error", "2"),
        ("run", "m.so", "--input", "photo.jpg"),
        ("report", "m.so", "--yaml"),
    ],
)
def test_wrong_usage_is_exit_code_2(invoke, arguments):
    assert invoke(*arguments).exit_code == 2


def test_compile_passes_everything_on(invoke, compiler, model, tmp_path):
    output = tmp_path / "model.so"
    samples = tmp_path / "samples.npz"
    np.savez(samples, x=np.zeros((4, 2, 3), np.float32))
    result = invoke(
        *(
            "compile",
            model,
            "-o",
            output,
            "--target",
            "x86-64-v3",
            "-c",
            samples,
            "-s",
            "x=1,3,224,224",
            "-s",
            "y=8",
        ),
        *(
            "--max-error",
            "1e-4",
            "--skip",
            "conv_1*",
            "--skip",
            "lv3",
            "--threads",
            "2",
            "--activations",
            "E3M4",
            "--recalibrate-batchnorm",
        ),
    )
    assert result.exit_code == 0, result.output
    ((mod, target, options),) = compiler.calls
    assert mod == str(model)
    assert str(target.attrs["mcpu"]) == "x86-64-v3"
    assert options["input_shapes"] == {"x": (1, 3, 224, 224), "y": (8,)}
    assert options["calibration"] == samples
    config = options["config"]
    assert (config.max_error, config.skip, config.threads, config.activations) == (
        1e-4,
        ("conv_1*", "lv3"),
        2,
        "E3M4",
    )
    assert config.recalibrate_batchnorm
    assert output.read_bytes() == b"library"
    assert "a note" in result.stdout
    assert str(output) in result.stdout


def test_compile_streams_a_folder_of_samples(invoke, compiler, model, tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    for index in range(3):
        np.savez(folder / f"{index}.npz", x=np.full((2, 3), index, np.float32))
    assert invoke("compile", model, "-o", tmp_path / "m.so", "-c", folder, "-q").exit_code == 0
    samples = compiler.calls[0][2]["calibration"]
    assert [float(sample["x"][0, 0]) for sample in samples] == [0, 1, 2]


def test_compile_errors_are_one_line_and_leave_nothing(invoke, compiler, model, tmp_path):
    output = tmp_path / "out" / "m.so"
    _fails(invoke("compile", model, "-o", output), "does not exist")
    output.parent.mkdir()
    _fails(invoke("compile", tmp_path / "other.onnx", "-o", output), "no such model")
    _fails(invoke("compile", model, "-o", output.parent), "is a folder")
    _fails(invoke("compile", model, "-o", output, "-t", "rpi44"), "rpi4")
    _fails(invoke("compile", model, "-o", output, "-t", "vulkan"), "vulkan")
    _fails(invoke("compile", model, "-o", output, "-c", tmp_path / "no.npz"), "no such calibration")
    _fails(invoke("compile", model, "-o", output, "-c", output.parent), "no .npz")
    assert compiler.calls == []
    compiler.raises = ModelError("weight 'w' holds\nNaN at (0, 1)")
    _fails(invoke("compile", model, "-o", output), "weight 'w' holds NaN at (0, 1)")
    compiler.raises = CalibrationError("sample 3 misses input [x]")
    _fails(invoke("compile", model, "-o", output), "misses input [x]")
    assert list(output.parent.iterdir()) == []


def test_compile_needs_a_linker(invoke, compiler, model, tmp_path):
    _fails(
        invoke("compile", model, "-o", tmp_path / "m.so", "-t", "rpi4", "--cc", "nosuch-g++"),
        "nosuch-g++",
        "--cc",
    )


def test_run_prints_and_writes_the_outputs(invoke, compiler, tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x=x)
    for given in (f"x={tmp_path}/x.npy", f"{tmp_path}/x.npz"):
        result = invoke("run", "m.so", "--input", given, "-o", tmp_path / "y.npz")
        assert result.exit_code == 0, result.output
        assert "y: float32 (2, 3), 1 to 6" in result.stdout
        np.testing.assert_array_equal(np.load(tmp_path / "y.npz")["y"], x + 1)
        (tmp_path / "y.npz").unlink()


def test_run_errors(invoke, compiler, tmp_path):
    (tmp_path / "text.npy").write_text("not an array")
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "two.npz", a=np.zeros(1), b=np.zeros(1))
    _fails(invoke("run", "m.so"), "input 'x' is missing")
    _fails(invoke("run", "m.so", "-i", f"x={tmp_path}/no.npy"), "No such file")
    _fails(invoke("run", "m.so", "-i", f"x={tmp_path}/text.npy"), "numpy.save")
    _fails(invoke("run", "m.so", "-i", f"{tmp_path}/text.npz"), "numpy.savez")
    _fails(invoke("run", "m.so", "-i", f"x={tmp_path}/two.npz"), "several arrays (a, b)")
    _fails(invoke("run", "m.so", "-o", tmp_path / "no" / "y.npz"), "does not exist")


def test_report(invoke, compiler):
    assert "matmul" in invoke("report", "m.so").stdout
    assert json.loads(invoke("report", "m.so", "--json").stdout)["layers"][0]["name"] == "lv0"


def test_load_errors_are_one_line(invoke, tmp_path):
    _fails(invoke("report", tmp_path / "no.so"), "no such module")
    (tmp_path / "cut.so").write_bytes(b"\x7fELF")
    _fails(invoke("run", tmp_path / "cut.so"), "cut.so")


def test_bench_counts_calls(invoke, compiler, tmp_path, monkeypatch):
    for variable in ("TVM_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.setenv(variable, "1")  # restored after the command has set it
    module = tmp_path / "m.so"
    module.write_bytes(b"library")
    result = invoke("bench", module, "-n", "3", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["repeat"] == 3
    assert [row["name"] for row in found["results"]] == ["QFP8"]
    assert "median" in invoke("bench", module, "-n", "1").stdout


def test_targets_lists_every_name(invoke):
    rows = {row["name"]: row for row in json.loads(invoke("targets", "--json").stdout)}
    assert rows["x86-64-v3"]["kernels"] == "avx2"
    assert rows["rpi5"]["features"] == ["neon", "dotprod"]
    assert (
        "host generic" in rows["cuda-sm90"]["features"]
        and "host cortex-a78ae" in rows["jetson-orin"]["features"]
    )
    assert "rpi4" in invoke("targets").stdout


def test_help_needs_no_tvm():
    code = (
        "import sys; from typer.testing import CliRunner; from tvm_qfp8.cli import app; "
        "assert CliRunner().invoke(app, ['compile', '--help']).exit_code == 0; "
        "sys.exit('tvm' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "tvm_qfp8", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("tvm-qfp8 ")
