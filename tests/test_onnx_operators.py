"""ONNX operators in the forms that TVM's importer lacks or reads in another way."""

import numpy as np
import onnx
import pytest
from import_checks import check
from models import model
from onnx import helper

from tvm_qfp8.calibration import evaluate
from tvm_qfp8.errors import UnsupportedOperatorError
from tvm_qfp8.importers import load_model
from tvm_qfp8.relay_passes.prepare import prepare

node = helper.make_node


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


def test_what_finds_a_number_of_results_is_refused():
    nodes = [node("NonMaxSuppression", ["boxes", "scores"], ["y"], name="nms")]
    made = model(nodes, {"boxes": (1, 10, 4), "scores": (1, 1, 10)}, {"y": (5, 3)}, {})
    with pytest.raises(
        UnsupportedOperatorError, match="'nms'.* as many results as it finds .* cut the model"
    ):
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


def branch(name, *nodes):
    return helper.make_graph(list(nodes), name, [], [helper.make_empty_tensor_value_info(name)])


def test_a_constant_condition_is_decided():
    branches = {
        "then_branch": branch("t", node("Relu", ["x"], ["t"])),
        "else_branch": branch("f", node("Neg", ["x"], ["f"])),
    }
    made = model([node("If", ["c"], ["y"], **branches)], {"x": (2, 3)}, {"y": (2, 3)}, {"c": np.array(True)})
    imported = load_model(made)
    assert "nn.relu" in imported.mod.script()


def test_a_condition_that_values_decide_chooses():
    """Names of the branches' own values may be those of the other branch, what they read is outside."""
    inner = {
        "then_branch": branch("p", node("Abs", ["x"], ["p"])),
        "else_branch": branch("q", node("Neg", ["v"], ["q"])),
    }
    branches = {
        "then_branch": branch("t", node("Add", ["x", "m"], ["v"]), node("If", ["c"], ["t"], **inner)),
        "else_branch": branch("f", node("Relu", ["x"], ["v"]), node("Sub", ["v", "m"], ["f"])),
    }
    nodes = [
        node("ReduceMean", ["x"], ["m"], axes=[0, 1], keepdims=1),
        node("Greater", ["m", "zero"], ["c"]),
        node("If", ["c"], ["y"], **branches),
    ]
    made = model(nodes, {"x": (2, 3)}, {"y": (2, 3)}, {"zero": np.zeros((1, 1), np.float32)})
    for x in (np.arange(6, dtype=np.float32), np.arange(6, dtype=np.float32) - 4):
        check(made, {"x": x.reshape(2, 3)})


def test_branches_of_different_shapes_are_refused():
    branches = {
        "then_branch": branch("t", node("Relu", ["x"], ["t"])),
        "else_branch": branch("f", node("ReduceSum", ["x"], ["f"])),
    }
    nodes = [
        node("ReduceMax", ["x"], ["m"]),
        node("Cast", ["m"], ["c"], to=9),
        node("If", ["c"], ["y"], **branches),
    ]
    with pytest.raises(
        UnsupportedOperatorError, match=r"If \(output 'y'\) has branches of the shapes \[2, 3\] and \[1, 1\]"
    ):
        load_model(model(nodes, {"x": (2, 3)}, {"y": ("a", "b")}, {}))


def test_a_switch_is_to_be_given():
    branches = {
        "then_branch": branch("t", node("Relu", ["x"], ["t"])),
        "else_branch": branch("f", node("Neg", ["x"], ["f"])),
    }
    nodes = [node("Equal", ["sr", "rate"], ["c"]), node("If", ["c"], ["y"], **branches)]
    made = model(nodes, {"x": (2, 3), "sr": ()}, {"y": (2, 3)}, {"rate": np.array(16000)})
    made.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.INT64
    with pytest.raises(UnsupportedOperatorError, match="value of input 'sr'; .* --param sr=VALUE"):
        load_model(made)
    imported = load_model(made, params={"sr": 16000})
    assert imported.input_names == ["x"] and "nn.relu" in imported.mod.script()


@pytest.mark.parametrize("operator", ["Max", "Min", "Sum", "Mean"])
def test_operators_of_several_inputs_make_no_stack(operator):
    made = model(
        [node(operator, ["a", "b", "c"], ["y"])],
        {"a": (2, 3), "b": (1, 3)},
        {"y": (2, 3)},
        {"c": np.float32([1, 2, 0])},
    )
    values = np.arange(9, dtype=np.float32) - 4
    imported = check(made, {"a": values[:6].reshape(2, 3), "b": values[None, 6:]})
    assert "stack" not in imported.mod.script()


@pytest.mark.parametrize(("onesided", "with_window"), [(1, True), (0, False)])
def test_fourier_transforms_become_convolutions(onesided, with_window):
    constants = {"step": np.array(8), "length": np.array(16)}
    if with_window:
        constants["window"] = np.hanning(16).astype(np.float32)
    given = ["x", "step", "window" if with_window else "", "length"]
    made = model(
        [node("STFT", given, ["y"], onesided=onesided)],
        {"x": (2, 64, 1)},
        {"y": ("a", "b", "c", 2)},
        constants,
    )
    check(made, {"x": np.random.default_rng(0).standard_normal((2, 64, 1)).astype(np.float32)})
