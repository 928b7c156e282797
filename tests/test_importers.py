"""Importers: files as downloaded come in, everything else is one clear line."""

import numpy as np
import onnx
import pytest
from models import cnn, images, model, run_reference
from onnx import helper, numpy_helper
from tvm import relax

from tvm_qfp8.calibration import evaluate
from tvm_qfp8.errors import ModelError, UnsupportedOperatorError
from tvm_qfp8.importers import load_model
from tvm_qfp8.relay_passes.prepare import prepare

node = helper.make_node


def check(made, inputs, **options):
    """Import, prepare, evaluate, compare with ONNX's reference implementation."""
    imported = load_model(made, **options)
    got = evaluate(prepare(imported.mod), inputs)
    for ours, theirs in zip(got, run_reference(made, inputs), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    return imported


@pytest.mark.parametrize("opset", [13, 17, 21])
def test_opsets(opset):
    imported = load_model(cnn(opset))
    # The reference implementation treats BatchNormalization before opset 14 as training, so 17 is the oracle of all.
    expected = run_reference(cnn(17), images(1)[0])
    np.testing.assert_allclose(
        evaluate(prepare(imported.mod), images(1)[0])[0], expected[0], rtol=1e-3, atol=1e-5
    )
    assert imported.input_names == ["image"] and imported.output_names == ["probabilities"]


def test_a_path_with_open_dimensions(tmp_path):
    path = tmp_path / "cnn.onnx"
    onnx.save(cnn(batch="N"), path)
    imported = load_model(str(path), input_shapes={"image": (1, 3, 16, 16)})
    assert [int(d) for d in imported.mod["main"].params[0].ty.shape] == [1, 3, 16, 16]
    with pytest.raises(ModelError, match=r"input 'image' has open dimensions \(N, 3, 16, 16\)"):
        load_model(str(path))
    with pytest.raises(ModelError, match="no input 'picture'"):
        load_model(str(path), input_shapes={"picture": (1, 3, 16, 16)})
    with pytest.raises(ModelError, match="dimension 1"):
        load_model(str(path), input_shapes={"image": (1, 4, 16, 16)})


def test_bad_files(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        load_model(tmp_path / "none.onnx")
    whole = cnn().SerializeToString()
    for name, content in {
        "short.onnx": whole[: len(whole) // 2],
        "empty.onnx": b"",
        "text.onnx": b"hello",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=name):
            load_model(tmp_path / name)
    with pytest.raises(ModelError, match=r"not an \.onnx file"):
        load_model(tmp_path / "model.pt")
    with pytest.raises(ModelError, match="type dict"):
        load_model({})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(value):
    made = cnn()
    for tensor in made.graph.initializer:
        if tensor.name == "w3":
            array = numpy_helper.to_array(tensor).copy()
            array[2, 5] = value
            tensor.CopyFrom(numpy_helper.from_array(array, "w3"))
    with pytest.raises(ModelError, match=r"'w3' is (nan|inf) at index \(2, 5, 0, 0\)"):
        load_model(made)


def test_an_unsupported_operator_is_named():
    made = model([node("Det", ["x"], ["y"], name="the_node")], {"x": (3, 3)}, {"y": ()}, {})
    with pytest.raises(UnsupportedOperatorError, match="operator Det .*'the_node'"):
        load_model(made)


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


def test_padding_goes_into_the_convolution():
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.standard_normal((4, 3, 3, 2)).astype(np.float32),
        "pads": np.array([0, 0, 1, 2, 0, 0, 0, 1], np.int64),
    }
    nodes = [
        node("Pad", ["x", "pads"], ["p"]),
        node("Conv", ["p", "w"], ["c"], pads=[0, 1, 1, 0]),
        node("Conv", ["x", "w"], ["d"], auto_pad="SAME_UPPER", strides=[2, 2]),
    ]
    made = model(nodes, {"x": (1, 3, 9, 8)}, {"c": (1, 4, 9, 11), "d": (1, 4, 5, 4)}, constants)
    imported = check(made, {"x": rng.standard_normal((1, 3, 9, 8)).astype(np.float32)})
    text = imported.mod.script()
    assert "call_tir" not in text and "nn.pad" not in text


def test_conv1d_and_transposed_convolution():
    rng = np.random.default_rng(0)
    constants = {
        "w1": rng.standard_normal((6, 4, 3)).astype(np.float32),
        "w2": rng.standard_normal((6, 5, 2, 2)).astype(np.float32),
        "shape": np.array([1, 6, 1, 12], np.int64),
    }
    nodes = [
        node("Conv", ["x", "w1"], ["c"], pads=[1, 1]),
        node("Reshape", ["c", "shape"], ["r"]),
        node("ConvTranspose", ["r", "w2"], ["y"], strides=[2, 2]),
    ]
    made = model(nodes, {"x": (1, 4, 12)}, {"y": (1, 5, 2, 24)}, constants)
    check(made, {"x": rng.standard_normal((1, 4, 12)).astype(np.float32)})


def test_relax_with_parameters():
    builder = relax.BlockBuilder()
    x, w = (relax.Var(name, relax.TensorType((4, 4), "float32")) for name in "xw")
    with builder.function("main", [x, w]):
        with builder.dataflow():
            y = builder.emit_output(relax.op.matmul(x, w))
        builder.emit_func_output(y)
    weight = np.eye(4, dtype=np.float32) * 2
    imported = load_model(builder.get(), params={"w": weight})
    assert imported.input_names == ["x"]
    x = np.ones((4, 4), np.float32)
    np.testing.assert_array_equal(evaluate(prepare(imported.mod), {"x": x})[0], x @ weight)
    with pytest.raises(ModelError, match="no parameter 'v'"):
        load_model(builder.get(), params={"v": weight})


def test_torch_export():
    torch = pytest.importorskip("torch", reason="torch is an extra")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
            self.norm = torch.nn.BatchNorm2d(8)
            self.dense = torch.nn.Linear(8, 16)
            self.layer_norm = torch.nn.LayerNorm(16)

        def forward(self, x):
            x = torch.nn.functional.silu(self.norm(self.conv(x)))
            x = torch.nn.functional.max_pool2d(x, 2).flatten(2).transpose(1, 2)
            x = self.layer_norm(torch.nn.functional.gelu(self.dense(x)))
            return torch.softmax(x + torch.nn.functional.scaled_dot_product_attention(x, x, x), -1)

    torch.manual_seed(0)
    net = Net().eval()
    x = torch.randn(1, 3, 8, 8)
    imported = load_model(torch.export.export(net, (x,)))
    with torch.no_grad():
        expected = net(x).numpy()
    name = imported.input_names[0]
    np.testing.assert_allclose(
        evaluate(prepare(imported.mod), {name: x.numpy()})[0], expected, rtol=1e-3, atol=1e-5
    )
    with pytest.raises(ModelError, match=r"torch\.export\.export"):
        load_model(net.conv)
