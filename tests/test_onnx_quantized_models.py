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


def test_a_bias_in_the_codes_of_a_product_is_kept():
    """As onnxruntime's older quantizer writes it: to round it to codes of a scale of 1 would lose it."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-9, 9, (2, 3, 1, 1)).astype(np.int8)
    bias = np.array([0.25, -0.75], np.float32)
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        node("ConvInteger", ["q", "w", "z"], ["p"]),
        node("Mul", ["s", "ws"], ["both"]),
        node("Div", ["b", "both"], ["d"]),
        node("Floor", ["d"], ["r"]),
        node("Cast", ["r"], ["i"], to=6),
        node("Reshape", ["i", "shape"], ["c"]),
        node("Add", ["p", "c"], ["sum"]),
        node("Cast", ["sum"], ["f"], to=1),
        node("Mul", ["f", "both"], ["y"]),
    ]
    constants = {"w": weight, "ws": np.float32(0.5), "b": bias, "shape": np.array([1, 2, 1, 1], np.int64)}
    made = model(nodes, {"x": (1, 3, 2, 2)}, {"y": (1, 2, 2, 2)}, constants)
    x = rng.standard_normal((1, 3, 2, 2)).astype(np.float32)
    expected = np.einsum("nchw,oc->nohw", x, weight[..., 0, 0] * 0.5) + bias[:, None, None]
    got = evaluate(prepare(load_model(made).mod), {"x": x})[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


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


def test_operators_on_codes_become_float():
    rng = np.random.default_rng(0)
    x, zero = np.float32(0.05), np.uint8(128)
    constants = {
        "s": x, "z": zero, "w": rng.integers(-9, 9, (4, 3, 1, 1)).astype(np.int8),
        "ws": np.array([0.1, 0.2, 0.3, 0.4], np.float32), "wz": np.zeros(4, np.int8), "b": np.arange(4, dtype=np.int32),
        "ys": np.float32(0.1), "ps": np.float32(0.5), "m": rng.integers(0, 255, (5, 2)).astype(np.uint8),
    }  # fmt: skip
    quantized = ["s", "z"]
    nodes = [
        node("QuantizeLinear", ["x", *quantized], ["q"]),
        node("QLinearConv", ["q", *quantized, "w", "ws", "wz", "ys", "z", "b"], ["c"]),
        node("QLinearMatMul", ["c", "ys", "z", "m", *quantized, "ps", "z"], ["p"]),
        node("DequantizeLinear", ["p", "ps", "z"], ["y"]),
    ]
    made = model(nodes, {"x": (1, 3, 2, 5)}, {"y": (1, 4, 2, 2)}, constants, opset=21)
    values = {"x": rng.uniform(-1, 1, (1, 3, 2, 5)).astype(np.float32)}
    expected = run_reference(made, values)[0]
    imported = load_model(made)
    assert "quantize" not in imported.mod.script().lower()
    got = evaluate(prepare(imported.mod), values)[0]
    assert np.square(got - expected).sum() < 1e-2 * np.square(expected).sum()  # the codes in between round


def test_onnxruntimes_operators_on_codes_become_float():
    """Each beside the float operator that it stands for, on exact codes."""
    x = np.arange(-8, 8, dtype=np.float32).reshape(1, 4, 2, 2)
    constants = {
        "s": np.float32(1), "z": np.int8(0), "w": np.arange(8, dtype=np.int8).reshape(2, 4),
        "ws": np.array([1, 2], np.float32), "wz": np.array([1, 0], np.int8), "b": np.array([3, -3], np.int32),
    }  # fmt: skip
    code = ["q", "s", "z"]

    def run(name, inputs, **attributes):
        shape = {"y": ("a", "b", "c", "d")}
        made = model([node("Identity", ["x"], ["y"])], {"x": x.shape}, shape, constants)
        nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"])]
        if name == "QGemm":
            del made.graph.output[0].type.tensor_type.shape.dim[2:]
            nodes += [node("GlobalMaxPool", ["q"], ["pool"]), node("Flatten", ["pool"], ["flat"])]
            nodes += [helper.make_node(name, inputs, ["y"], domain="com.microsoft", **attributes)]
        else:
            nodes += [helper.make_node(name, inputs, ["c"], domain="com.microsoft", **attributes)]
            nodes += [node("DequantizeLinear", ["c", "s", "z"], ["y"])]
        del made.graph.node[:]
        made.graph.node.extend(nodes)
        return evaluate(prepare(load_model(made).mod), {"x": x})[0]

    two = [*code, *code, "s", "z"]
    np.testing.assert_array_equal(run("QLinearAdd", two), 2 * x)
    np.testing.assert_array_equal(run("QLinearMul", two), x * x)
    np.testing.assert_array_equal(
        run("QLinearConcat", ["s", "z", *code, *code], axis=1), np.concatenate([x, x], 1)
    )
    np.testing.assert_allclose(
        run("QLinearLeakyRelu", [*code, "s", "z"], alpha=0.5), np.where(x < 0, x / 2, x)
    )
    soft = run("QLinearSoftmax", [*code, "s", "z"], axis=3, opset=17)
    np.testing.assert_allclose(soft, np.exp(x) / np.exp(x).sum(-1, keepdims=True), rtol=1e-5)
    mean = run("QLinearGlobalAveragePool", [*code, "s", "z"], channels_last=0)
    np.testing.assert_allclose(mean, x.mean((2, 3), keepdims=True))
    weight = (constants["w"] - np.float32([[1], [0]])) * constants["ws"][:, None]
    expected = x.max((2, 3)) @ weight.T + constants["b"] * constants["ws"]
    gemm = ["flat", "s", "z", "w", "ws", "wz", "b"]
    np.testing.assert_allclose(run("QGemm", gemm, transB=1), expected)
