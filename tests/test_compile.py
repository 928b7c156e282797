"""The whole way: compile, run, save, load in a fresh process, report, and every error a user can make on it."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from models import cnn, images, model, run_reference
from onnx import helper
from relax_programs import build
from tvm import relax

import tvm_qfp8 as q
from tvm_qfp8.calibration import calibrate, evaluate_quantized
from tvm_qfp8.errors import CalibrationError, InputError, ModelError, QFP8Error, TargetError
from tvm_qfp8.importers import load_model
from tvm_qfp8.relay_passes.prepare import prepare

TARGETS = ["x86-64", "x86-64-v3", "native"]


@pytest.fixture(scope="module")
def compiled():
    return q.compile(cnn(), calibration=images(8))


@pytest.fixture(scope="module")
def exported(compiled, tmp_path_factory):
    path = tmp_path_factory.mktemp("module") / "cnn.so"
    compiled.export_library(path)
    return path


def test_close_to_float32_and_to_the_simulation(compiled):
    inputs = images(1, seed=9)[0]
    (ours,), (float32,) = compiled.run(inputs), run_reference(cnn(), inputs)
    np.testing.assert_allclose(ours, float32, atol=0.02)
    canonical = prepare(load_model(cnn()).mod)
    plan = calibrate(canonical, images(8))
    # Same codes but for values that float32 rounding puts on the other side of a tie.
    np.testing.assert_allclose(ours, evaluate_quantized(canonical, plan, inputs)[0], atol=5e-3)


def test_calls_by_position_and_name_agree(compiled):
    inputs = images(1)[0]
    np.testing.assert_array_equal(compiled(inputs["image"])[0], compiled.run(inputs)[0])


def test_non_contiguous_input(compiled):
    image = images(1)[0]["image"]
    turned = np.asfortranarray(image)
    np.testing.assert_array_equal(compiled(turned)[0], compiled(image)[0])


def test_export_and_load_give_the_same_bits(compiled, exported):
    inputs = images(1, seed=3)[0]
    loaded = q.load(exported)
    np.testing.assert_array_equal(loaded.run(inputs)[0], compiled.run(inputs)[0])
    assert loaded.report.to_json() == compiled.report.to_json()
    assert [(i.name, i.shape, i.dtype) for i in loaded.inputs] == [("image", (1, 3, 16, 16), "float32")]
    with pytest.raises(ModelError, match="copy the file"):
        loaded.export_library("other.so")


def test_a_fresh_process_needs_only_the_runtime(compiled, exported, tmp_path):
    """No tvm_qfp8 and no compiler: tvm_ffi, TVM's runtime library, NumPy."""
    inputs = images(1, seed=4)[0]
    np.save(tmp_path / "x.npy", inputs["image"])
    code = f"""
import ctypes, importlib.util, pathlib, sys
import numpy as np, tvm_ffi
library = pathlib.Path(importlib.util.find_spec("tvm").origin).parent / "lib" / "libtvm_runtime.so"
ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
vm = tvm_ffi.load_module({str(exported)!r})["vm_load_executable"]()
vm["vm_initialization"](1, 0, 2)
y = np.from_dlpack(vm["main"](tvm_ffi.from_dlpack(np.load({str(tmp_path / "x.npy")!r}))))
np.save({str(tmp_path / "y.npy")!r}, y)
assert "tvm_qfp8" not in sys.modules and "tvm" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), compiled.run(inputs)[0])


def test_every_target_and_thread_count_gives_the_same_bits():
    inputs = images(1, seed=5)[0]
    results = [
        q.compile(cnn(), target, calibration=images(4), config=q.Config(threads=threads)).run(inputs)[0]
        for target, threads in [*((t, 1) for t in TARGETS), ("native", 2)]
    ]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_batches():
    pair = np.concatenate([sample["image"] for sample in images(2)])
    module = q.compile(cnn(batch=2), calibration=[{"image": pair}])
    np.testing.assert_allclose(module(pair)[0], run_reference(cnn(batch=2), {"image": pair})[0], atol=0.03)
    with pytest.raises(ModelError, match="positive dimensions"):
        q.compile(cnn(batch="N"), input_shapes={"image": (0, 3, 16, 16)})


def test_weights_only():
    module = q.compile(cnn(), config=q.Config(activations="float32"))
    inputs = images(1)[0]
    np.testing.assert_allclose(module.run(inputs)[0], run_reference(cnn(), inputs)[0], atol=0.02)
    assert any("only weights" in note for note in module.report.notes)
    linear = [layer for layer in module.report.layers if layer.operator in ("conv2d", "matmul")]
    assert {layer.became for layer in linear} == {"QFP8 weights"}


def test_skipped_layers_stay_float32():
    everything = q.compile(cnn(), calibration=images(2), config=q.Config(skip=("*",)))
    inputs = images(1)[0]
    np.testing.assert_allclose(everything.run(inputs)[0], run_reference(cnn(), inputs)[0], atol=2e-3)
    skipped = [layer for layer in everything.report.layers if layer.operator in ("conv2d", "matmul")]
    assert all(layer.became == "float32" and "skip" in layer.reason for layer in skipped)


def test_report(compiled):
    data = json.loads(compiled.report.to_json())
    layers = {layer["operator"]: layer for layer in data["layers"]}
    assert {"conv2d", "matmul", "softmax"} <= set(layers)
    convolution = layers["conv2d"]
    assert convolution["weight_layout"] in ("E2M5", "E1M6") and convolution["sqnr_db"] > 25
    assert convolution["bytes_after"] < 0.4 * convolution["bytes_before"]
    assert "conv2d" in compiled.report.to_text()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x[:, :, :8], r"shape \(1, 3, 8, 16\), the module takes \(1, 3, 16, 16\)"),
        (lambda x: x.astype(np.float64), "dtype float64"),
        (
            lambda x: np.where(np.arange(16) == 3, np.nan, x).astype(np.float32),
            r"nan at index \(0, 0, 0, 3\)",
        ),
        (
            lambda x: np.where(np.arange(16) == 2, np.inf, x).astype(np.float32),
            r"inf at index \(0, 0, 0, 2\)",
        ),
    ],
)
def test_bad_inputs_are_refused(compiled, change, message):
    with pytest.raises(InputError, match=message):
        compiled.run({"image": change(images(1)[0]["image"])})


def test_wrong_names_are_refused(compiled):
    with pytest.raises(InputError, match="no input is named 'picture'"):
        compiled.run({"picture": images(1)[0]["image"]})
    with pytest.raises(InputError, match="'image' is missing"):
        compiled.run({})
    with pytest.raises(InputError, match="0 arrays given"):
        compiled()


def test_huge_and_tiny_values_saturate(compiled):
    for value in (3e38, -3e38, 1e-45, 0.0):
        (result,) = compiled(np.full((1, 3, 16, 16), value, np.float32))
        assert np.isfinite(result).all() and abs(result.sum() - 1) < 1e-2


def test_calibration_errors():
    with pytest.raises(CalibrationError, match="image"):
        q.compile(cnn(), calibration=[{"picture": images(1)[0]["image"]}])
    with pytest.raises(CalibrationError, match=r"\(1, 3, 8, 8\)"):
        q.compile(cnn(), calibration=[{"image": np.zeros((1, 3, 8, 8), np.float32)}])


def test_target_errors():
    with pytest.raises(TargetError):
        q.compile(cnn(), "x86-64-v33")


def test_nothing_is_left_when_export_fails(compiled, tmp_path):
    def broken(*_arguments, **_options):
        raise RuntimeError("no linker")

    with pytest.raises(RuntimeError, match="no linker"):
        compiled.export_library(tmp_path / "x.so", fcompile=broken)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ModelError, match="does not exist"):
        compiled.export_library(tmp_path / "none" / "x.so")


def test_load_errors(tmp_path):
    with pytest.raises(ModelError, match="no such module"):
        q.load(tmp_path / "none.so")
    (tmp_path / "bad.so").write_bytes(b"not a library")
    with pytest.raises(ModelError, match="no shared library"):
        q.load(tmp_path / "bad.so")


def test_every_error_is_a_qfp8_error():
    for error in (CalibrationError, InputError, ModelError, TargetError):
        assert issubclass(error, QFP8Error)


@pytest.mark.aarch64
def test_a_whole_model_gives_the_same_bits_on_aarch64(compiled, run_aarch64):
    inputs = images(1, seed=7)[0]
    arm = q.compile(cnn(), "llvm -mtriple=aarch64-linux-gnu", calibration=images(8))
    with pytest.raises(ModelError, match="export it and run it there"):
        arm.run(inputs)
    np.testing.assert_array_equal(run_aarch64(arm, [inputs["image"]])[0], compiled.run(inputs)[0])


def test_indices_outside_never_read_foreign_memory():
    nodes = [helper.make_node("Gather", ["x", "i"], ["y"], axis=1)]
    inputs = [
        helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (2, 6)),
        helper.make_tensor_value_info("i", onnx.TensorProto.INT64, (3,)),
    ]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (2, 3))]
    graph = helper.make_graph(nodes, "gather", inputs, outputs)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    module = q.compile(made)
    x = np.arange(12, dtype=np.float32).reshape(2, 6)
    for indices in ([0, 5, -1], [-6, 2, 3]):
        np.testing.assert_array_equal(module.run({"x": x, "i": np.array(indices)})[0], x[:, indices])
    (found,) = module.run({"x": x, "i": np.array([6, -7, 2**62])})
    assert np.isin(found, x).all()


def test_powers_of_fewer_values_than_a_register_holds():
    def body(emit, x):
        return emit(relax.op.power(x, relax.const(np.float32(1 / 3))))

    x = np.linspace(0.1, 9, 12, dtype=np.float32)
    (found,) = q.compile(build({"x": ((12,), "float32")}, body))(x)
    np.testing.assert_allclose(found, x ** np.float32(1 / 3), rtol=1e-3)


def test_results_belong_to_the_caller():
    """Large ones are not copied: a constant, an input and a result that is there twice must be."""
    table = np.arange(40000, dtype=np.float32).reshape(200, 200)

    def body(emit, x):
        y = emit(relax.op.add(x, relax.const(table)))
        flat = emit(relax.op.reshape(y, (40000,)))
        return emit(relax.Tuple([y, flat, x, relax.const(table), y]))

    module = q.compile(build({"x": ((200, 200), "float32")}, body))
    x = np.ones((200, 200), np.float32)
    expected = [x + table, (x + table).reshape(-1), x, table, x + table]
    first = module(x)
    for array, right in zip(first, expected, strict=True):
        np.testing.assert_array_equal(array, right)
    for array in first:
        array[...] = np.nan  # changes no other result, nor those of the next call
        assert sum(bool(np.isnan(other).any()) for other in first) == 1
        array[...] = 0
    assert (x == 1).all()
    for array, right in zip(module(x), expected, strict=True):
        np.testing.assert_array_equal(array, right)
    assert not any(array.any() for array in first)


def test_a_weighted_sum_of_each_row_stays_float32():
    """One multiply-add a value, as YOLO's expectation over distances: a rounded input would save nothing."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((8, 16)).astype("float32"),
        "v": np.arange(16, dtype="float32").reshape(16, 1),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Softmax", ["a"], ["b"], axis=-1),
        helper.make_node("MatMul", ["b", "v"], ["y"]),
    ]
    samples = [{"x": rng.standard_normal((4, 8)).astype("float32")} for _ in range(4)]
    module = q.compile(model(nodes, {"x": (4, 8)}, {"y": (4, 1)}, weights), calibration=samples)
    became = {layer.name: (layer.became, layer.reason) for layer in module.report.layers}
    assert became["a"][0] == "QFP8" and became["y"] == (
        "float32",
        "one multiply-add a value: rounding saves nothing",
    )
    assert any("4 samples decided" in note for note in module.report.notes)
