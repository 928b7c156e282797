"""Importers: files as downloaded come in, everything else is one clear line."""

import numpy as np
import onnx
import pytest
from import_checks import check
from models import cnn, images, model, run_reference
from onnx import helper, numpy_helper
from tvm import relax

import tvm_qfp8
from tvm_qfp8.calibration import evaluate
from tvm_qfp8.errors import ModelError, UnsupportedOperatorError
from tvm_qfp8.importers import load_model
from tvm_qfp8.importers.onnx_operators import inferred_shapes
from tvm_qfp8.relay_passes.prepare import prepare

node = helper.make_node


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


def test_inputs_become_constants():
    nodes = [node("Mul", ["x", "gain"], ["z"]), node("Add", ["z", "bias"], ["y"])]
    made = model(nodes, {"x": ("n", 4), "gain": (), "bias": ("n", 4)}, {"y": ("n", 4)}, {})
    params = {"gain": 3, "bias": np.arange(8).reshape(2, 4)}
    imported = load_model(made, params=params, input_shapes={"x": (2, 4)})
    assert imported.input_names == ["x"]
    x = np.ones((2, 4), np.float32)
    np.testing.assert_array_equal(evaluate(prepare(imported.mod), {"x": x})[0], 3 * x + params["bias"])
    with pytest.raises(ModelError, match="no input 'sr'"):
        load_model(made, params={"sr": 16000})
    with pytest.raises(ModelError, match="'bias' is given a number and has open dimensions"):
        load_model(made, params={"bias": 0})
    with pytest.raises(ModelError, match="'bias' has 4 in dimension 1"):
        load_model(made, params={"bias": np.zeros((2, 3))})


def test_all_open_inputs_are_named_with_likely_shapes():
    made = model(
        [node("Mul", ["x", "s"], ["y"])],
        {"x": ("t", 3, "h", "w"), "s": (2, "batch", "k")},
        {"y": ("a", "b", "c", "d")},
        {},
    )
    with pytest.raises(
        ModelError, match=r"'x' .*, input 's' .*--input-shape x=1,3,224,224 --input-shape s=2,1,128"
    ):
        load_model(made)


def test_exporters_that_number_open_dimensions():
    def named(first, second):
        nodes = [node("Add", ["a", "b"], ["y"])]
        return model(nodes, {"a": (first, 4), "b": (second, 4)}, {"y": (first, 4)}, {})

    assert load_model(named("unk__7", "unk__8")).batch == "batch"
    assert load_model(named("p2o.DynamicDimension.0", "p2o.DynamicDimension.1")).batch == "batch"
    with pytest.raises(ModelError, match="open dimensions"):
        load_model(named("unk__7", "time"))


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


def test_inputs_that_only_give_a_shape_stay_inputs():
    nodes = [
        helper.make_node("Shape", ["lengths"], ["count"]),
        helper.make_node("ConstantOfShape", ["count"], ["zeros"]),
        helper.make_node("Relu", ["x"], ["y"]),
    ]
    made = model(nodes, {"unread": (2,), "lengths": (3,), "x": (2, 3)}, {"y": (2, 3), "zeros": (3,)}, {})
    module = tvm_qfp8.compile(made)
    assert [spec.name for spec in module.inputs] == ["unread", "lengths", "x"]
    x = np.array([[1, -2, 3], [-4, 5, -6]], np.float32)
    y, zeros = module.run({"x": x, "lengths": np.ones(3, np.float32), "unread": np.ones(2, np.float32)})
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    np.testing.assert_array_equal(zeros, np.zeros(3))


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_network_may_end_in_a_single_number(calibrated):
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.standard_normal((8, 1)).astype(np.float32),
        "b": np.float32(0.5),
        "first": np.array([0]),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["shifted"]),
        helper.make_node("Squeeze", ["shifted", "first"], ["number"]),
        helper.make_node("Sigmoid", ["number"], ["y"]),
    ]
    made = model(nodes, {"x": (8,)}, {"y": ()}, constants)
    samples = [{"x": rng.standard_normal(8).astype(np.float32)} for _ in range(4)]
    module = tvm_qfp8.compile(made, calibration=samples if calibrated else None)
    (got,) = module.run(samples[0])
    expected = 1 / (1 + np.exp(-(samples[0]["x"] @ constants["w"][:, 0] + 0.5)))
    assert got.shape == () and abs(got - expected) < 0.05
