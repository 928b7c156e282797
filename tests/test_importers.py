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
from tvm_qfp8.importers.onnx_operators import inferred_shapes
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
    onnx.save(cnn(batch="time"), path)
    with pytest.raises(ModelError, match=r"input 'image' has open dimensions \(time, 3, 16, 16\)"):
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


def test_open_dimensions_in_every_spelling(tmp_path):
    for value in ("N", -1, 0, None):
        made = cnn(batch=1)
        dim = made.graph.input[0].type.tensor_type.shape.dim[0]
        dim.Clear()
        if isinstance(value, str):
            dim.dim_param = value
        elif value is not None:
            dim.dim_value = value
        assert load_model(made, input_shapes={"image": (1, 3, 16, 16)}).input_names == ["image"]
        if value != "N":
            with pytest.raises(ModelError, match="open dimensions"):
                load_model(made)
    with pytest.raises(ModelError, match="positive"):
        load_model(cnn(batch="N"), input_shapes={"image": (0, 3, 16, 16)})


def test_a_variant_that_tvm_reads_in_another_way_is_refused():
    nodes = [node("LayerNormalization", ["x", "g", "b"], ["y", "mean"], name="norm")]
    constants = {"g": np.ones(4, np.float32), "b": np.zeros(4, np.float32)}
    made = model(nodes, {"x": (3, 4)}, {"y": (3, 4), "mean": (3, 1)}, constants)
    with pytest.raises(UnsupportedOperatorError, match="LayerNormalization .*'norm'.* mean"):
        load_model(made)
    scales = {"s": np.array([1, 1, 0.5, 0.5], np.float32)}
    nodes = [node("Resize", ["x", "", "s"], ["y"], antialias=1)]
    made = model(nodes, {"x": (1, 1, 4, 4)}, {"y": (1, 1, 2, 2)}, scales, opset=18)
    with pytest.raises(UnsupportedOperatorError, match="antialias"):
        load_model(made)


def test_an_operator_that_fails_inside_tvm_is_named():
    constants = {"depth": np.float32(4), "values": np.array([0, 1], np.float32)}
    nodes = [node("OneHot", ["x", "depth", "values"], ["y"], name="hot")]
    made = model(nodes, {"x": (3,)}, {"y": (3, 4)}, constants)
    with pytest.raises(UnsupportedOperatorError, match="OneHot .*'hot'"):
        load_model(made)


def test_operators_that_onnx_defines_by_others():
    constants = {"e": np.array([2], np.int64)}
    nodes = [
        node("Celu", ["x"], ["a"], alpha=2.0),
        node("LpNormalization", ["a"], ["b"], axis=1),
        node("Pow", ["b", "e"], ["y"]),
    ]
    made = model(nodes, {"x": (3, 4)}, {"y": (3, 4)}, constants)
    check(made, {"x": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)})


def test_padding_rules_of_pooling_and_transposed_convolution():
    rng = np.random.default_rng(0)
    constants = {"w": rng.standard_normal((3, 2, 3, 3)).astype(np.float32)}
    nodes = [
        node("MaxPool", ["x"], ["a"], kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
        node("MaxPool", ["x"], ["b"], kernel_shape=[1, 1], strides=[2, 2], ceil_mode=1),
        node(
            "AveragePool", ["x"], ["c"], kernel_shape=[3, 2], strides=[2, 3], pads=[1, 0, 1, 1], ceil_mode=1
        ),
        node("ConvTranspose", ["x", "w"], ["d"], strides=[3, 2], output_shape=[25, 15]),
        node("ConvTranspose", ["x", "w"], ["e"], strides=[2, 2], output_shape=[15, 13]),
    ]
    made = model(nodes, {"x": (1, 3, 8, 7)}, dict.fromkeys("abcde", [None] * 4), constants)
    x = rng.standard_normal((1, 3, 8, 7)).astype(np.float32)
    # ONNX's reference implementation and its specification differ on windows that begin in the padding.
    runtime = pytest.importorskip("onnxruntime")
    expected = runtime.InferenceSession(made.SerializeToString()).run(None, {"x": x})
    for ours, theirs in zip(evaluate(prepare(load_model(made).mod), {"x": x}), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


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


def test_half_precision_becomes_float32():
    constants = {"w": np.eye(4, dtype=np.float32)}
    made = model([node("MatMul", ["x", "w"], ["y"])], {"x": (1, 4)}, {"y": (1, 4)}, constants)
    made.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.eye(4, dtype=np.float16), "w"))
    for value in (*made.graph.input, *made.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    imported = load_model(made)
    assert imported.notes == ["float16 became float32, inputs and outputs too"]
    assert str(imported.mod["main"].params[0].ty.dtype) == "float32"


def test_a_mask_may_hold_infinity_a_weight_may_not_hold_nan():
    mask = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
    nodes = [node("Add", ["x", "mask"], ["m"]), node("Softmax", ["m"], ["y"])]
    check(model(nodes, {"x": (4, 4)}, {"y": (4, 4)}, {"mask": mask}), {"x": np.eye(4, dtype=np.float32)})
    value = numpy_helper.from_array(np.array([[np.nan]], np.float32))
    nodes = [node("Constant", [], ["c"], value=value), node("MatMul", ["x", "c"], ["y"])]
    with pytest.raises(ModelError, match=r"'c' is nan at index \(0, 0\)"):
        load_model(model(nodes, {"x": (1, 1)}, {"y": (1, 1)}, {}))


@pytest.mark.parametrize(
    "attributes", [{"transB": 1}, {"alpha": 0.5, "beta": 2.0}, {"transA": 1, "transB": 1}]
)
def test_gemm(attributes):
    rng = np.random.default_rng(0)
    shape = (3, 4) if attributes.get("transB") else (4, 3)
    constants = {"w": rng.standard_normal(shape).astype(np.float32), "b": np.arange(3, dtype=np.float32)}
    x = rng.standard_normal((4, 2) if attributes.get("transA") else (2, 4)).astype(np.float32)
    made = model(
        [node("Gemm", ["x", "w", "b"], ["y"], **attributes)], {"x": x.shape}, {"y": (2, 3)}, constants
    )
    check(made, {"x": x})


@pytest.mark.parametrize("opset", [7, 10, 11])
def test_old_clips(opset):
    nodes = [node("Clip", ["x"], ["y"], min=0.0, max=6.0)]
    constants = {}
    if opset >= 11:
        nodes, constants = (
            [node("Clip", ["x", "low", "high"], ["y"])],
            {"low": np.float32(0), "high": np.float32(6)},
        )
    imported = load_model(model(nodes, {"x": (2, 3)}, {"y": (2, 3)}, constants, opset))
    text = prepare(imported.mod).script()
    assert "R.clip" in text and "call_tir" not in text


@pytest.mark.parametrize("given", [{}, {"axes": [1, 0]}])
def test_old_slices(given):
    made = model(
        [node("Slice", ["x"], ["y"], starts=[1, -2], ends=[9, -1], **given)], {"x": (3, 4)}, {}, {}, 9
    )
    made.graph.output.append(helper.make_tensor_value_info("y", 1, (1, 3) if given else (2, 1)))
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = x[-2:-1, 1:9] if given else x[1:9, -2:-1]
    np.testing.assert_array_equal(evaluate(prepare(load_model(made).mod), {"x": x})[0], expected)


def test_a_constant_condition_is_decided():
    def branch(name, operator):
        return helper.make_graph(
            [node(operator, ["x"], [name])], name, [], [helper.make_empty_tensor_value_info(name)]
        )

    nodes = [node("If", ["c"], ["y"], then_branch=branch("t", "Relu"), else_branch=branch("f", "Neg"))]
    made = model(nodes, {"x": (2, 3)}, {"y": (2, 3)}, {"c": np.array(True)})
    imported = load_model(made)
    assert "nn.relu" in imported.mod.script()


def test_torch_with_open_dimensions_and_bad_weights():
    torch = pytest.importorskip("torch", reason="torch is an extra")
    net = torch.nn.Linear(4, 3).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (torch.zeros(2, 4),), dynamic_shapes=({0: batch},))
    name = load_model(program, input_shapes={"input": (5, 4)}).input_names[0]
    assert name == "input"
    with pytest.raises(ModelError, match="'input' has open dimensions"):
        load_model(program)
    net.weight.data[1, 2] = float("inf")
    with pytest.raises(ModelError, match=r"'weight' is inf at index \(1, 2\)"):
        load_model(torch.export.export(net, (torch.zeros(2, 4),)))


def test_shapes_behind_computed_shapes_are_found(monkeypatch):
    """Window attention pads by what its input leaves over: one round of the simplifier finds the first such shape."""
    constants = {"first": np.array([0], np.int64), "rest": np.array([-1], np.int64)}
    nodes, x = [], "x"
    for i in range(3):
        names = [f"{part}{i}" for part in ("shape", "rows", "wanted", "x")]
        nodes += [
            node("Shape", [x], names[:1]),
            node("Gather", [names[0], "first"], names[1:2]),
            node("Concat", [names[1], "rest"], names[2:3], axis=0),
            node("Reshape", [x, names[2]], names[3:]),
        ]
        x = names[3]
    rounds = 0

    def one_shape_a_round(made, **_):
        nonlocal rounds
        rounds += 1
        result = onnx.ModelProto()
        result.CopyFrom(made)
        shape = next(n for n in result.graph.node if n.op_type == "Shape")
        result.graph.initializer.append(numpy_helper.from_array(np.array([6, 5]), shape.output[0]))
        result.graph.node.remove(shape)
        return result

    monkeypatch.setattr("onnxslim.slim", one_shape_a_round)
    imported = load_model(model(nodes, {"x": (6, 5)}, {x: (6, 5)}, constants))
    assert rounds == 3 and imported.mod["main"].ret_ty.shape[0].value == 6


def test_shapes_are_inferred_without_the_weights():
    weight = np.ones((64, 3, 5, 5), np.float32)  # large enough to be left out; the new shape is not
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"]),
        helper.make_node("Reshape", ["y", "shape"], ["z"]),
    ]
    constants = {"w": weight, "shape": np.array([1, 64, 16], np.int64)}
    made = model(nodes, {"x": (1, 3, 8, 8)}, {"z": (1, 64, 16)}, constants)
    found = inferred_shapes(made)
    assert (found["y"], found["z"]) == ([1, 64, 4, 4], [1, 64, 16])
    assert numpy_helper.to_array(made.graph.initializer[0]).shape == weight.shape


def test_a_given_model_is_left_as_it_was():
    made = cnn()
    before = made.SerializeToString()
    load_model(made)
    assert made.SerializeToString() == before
