"""Quantized ONNX models become float32."""

import numpy as np
import pytest
from import_checks import check
from models import model, run_reference
from onnx import helper

from tvm_qfp8.calibration import evaluate
from tvm_qfp8.importers import load_model
from tvm_qfp8.relay_passes.prepare import prepare

node = helper.make_node


def test_quantized_models_come_in_as_float():
    weight = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)
    constants = {"s": np.float32(0.1), "z": np.int8(3), "w": weight, "ws": np.full(4, 0.5, np.float32)}
    constants["wz"] = np.zeros(4, np.int8)
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("DequantizeLinear", ["w", "ws", "wz"], ["dw"], axis=1),
        node("MatMul", ["d", "dw"], ["y"]),
    ]
    imported = load_model(model(nodes, {"x": (2, 4)}, {"y": (2, 4)}, constants))
    assert "3 QuantizeLinear/DequantizeLinear nodes were removed" in imported.notes[0]
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    np.testing.assert_allclose(
        evaluate(prepare(imported.mod), {"x": x})[0], x @ (weight * np.float32(0.5)), rtol=1e-5
    )


def test_embeddings_of_codes_are_scaled_after_the_look_up():
    table = np.arange(24, dtype=np.uint8).reshape(6, 4)
    constants = {"t": table, "s": np.float32(0.1), "z": np.uint8(3), "i": np.array([5, 0], np.int64)}
    nodes = [
        node("Gather", ["t", "i"], ["g"]),
        node("Transpose", ["g"], ["p"], perm=[1, 0]),
        node("DequantizeLinear", ["p", "s", "z"], ["d"]),
        node("Add", ["d", "x"], ["y"]),
    ]
    made = model(nodes, {"x": (4, 2)}, {"y": (4, 2)}, constants, opset=21)
    check(made, {"x": np.ones((4, 2), np.float32)})


@pytest.mark.parametrize("zero", [np.uint8(7), np.arange(5, dtype=np.uint8)])
def test_dynamic_quantization_becomes_float(zero):
    rng = np.random.default_rng(0)
    weight = rng.integers(0, 256, (8, 5)).astype(np.uint8)
    scales = np.full(zero.shape, 0.01, np.float32)
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        node("MatMulInteger", ["q", "w", "z", "wz"], ["p"]),
        node("Cast", ["p"], ["f"], to=1),
        node("Mul", ["s", "ws"], ["both"]),
        node("Mul", ["f", "both"], ["y"]),
    ]
    made = model(nodes, {"x": (3, 8)}, {"y": (3, 5)}, {"w": weight, "wz": zero, "ws": scales})
    imported = load_model(made)
    assert "1 DynamicQuantizeLinear nodes were removed" in imported.notes[0]
    x = rng.standard_normal((3, 8)).astype(np.float32)
    expected = x @ ((weight.astype(np.float32) - zero) * np.float32(0.01))
    np.testing.assert_allclose(evaluate(prepare(imported.mod), {"x": x})[0], expected, rtol=1e-4, atol=1e-5)


def test_saturation_of_a_quantized_model_stays():
    """onnxruntime's quantizer drops a ReLU before codes that begin at 0."""
    constants = {"w": np.eye(4, dtype=np.float32), "s": np.float32(6 / 255), "z": np.uint8(0)}
    nodes = [
        node("MatMul", ["x", "w"], ["m"]),
        node("QuantizeLinear", ["m", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("MatMul", ["d", "w"], ["y"]),
    ]
    imported = load_model(model(nodes, {"x": (1, 4)}, {"y": (1, 4)}, constants))
    x = np.array([[-2, 0.5, 3, 9]], np.float32)
    np.testing.assert_allclose(evaluate(prepare(imported.mod), {"x": x})[0], np.clip(x, 0, 6), rtol=1e-6)


def test_a_dynamically_quantized_lstm_becomes_an_lstm():
    """onnxruntime's: weights (directions, inputs, gates), a scale for each direction or each of its gates."""
    rng = np.random.default_rng(0)
    codes = {
        "W": rng.integers(-9, 9, (2, 3, 16)).astype(np.int8),
        "R": rng.integers(0, 9, (2, 4, 16)).astype(np.uint8),
    }
    scales = {"W": np.array([0.1, 0.2], np.float32), "R": rng.uniform(0.01, 0.1, (2, 16)).astype(np.float32)}
    zeros = {"W": np.array([1, -1], np.int8), "R": np.full((2, 16), 4, np.uint8)}
    attributes = {"hidden_size": 4, "direction": "bidirectional"}
    shapes = {"x": (5, 1, 3)}, {"y": (5, 2, 1, 4)}

    def floats(name):
        zero, scale = (part[name].reshape(2, 1, -1) for part in (zeros, scales))
        return ((codes[name].astype(np.float32) - zero) * scale).transpose(0, 2, 1)

    plain = model(
        [node("LSTM", ["x", "W", "R"], ["y"], **attributes)], *shapes, {n: floats(n) for n in codes}
    )
    names = [f"{name}_{part}" for name in codes for part in ("scale", "zero")]
    inputs = ["x", "W", "R", "", "", "", "", "", *names]
    constants = (
        codes | {f"{n}_scale": v for n, v in scales.items()} | {f"{n}_zero": v for n, v in zeros.items()}
    )
    made = model([node("Identity", ["x"], ["y"])], *shapes, constants)
    made.graph.node[0].CopyFrom(
        helper.make_node("DynamicQuantizeLSTM", inputs, ["y"], domain="com.microsoft", **attributes)
    )
    x = rng.standard_normal((5, 1, 3)).astype(np.float32)
    imported = load_model(made)
    assert imported.notes == ["1 DynamicQuantizeLSTM nodes are imported as float32"]
    expected = run_reference(plain, {"x": x})[0]
    np.testing.assert_allclose(evaluate(prepare(imported.mod), {"x": x})[0], expected, rtol=1e-4, atol=1e-5)
