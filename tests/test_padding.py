"""Padding of images by their own pixels: found in files and programs, followed by passes, copied by whole runs."""

import numpy as np
import onnx
import pytest
from onnx import helper
from quantized_programs import RUNS, TARGETS
from relax_programs import NHWC, build, constant, random
from tvm import relax
from tvm.relax import op as R

import tvm_qfp8
from tvm_qfp8.calibration import calibrate, evaluate
from tvm_qfp8.errors import UnsupportedOperatorError
from tvm_qfp8.importers import load_model
from tvm_qfp8.relay_passes.fuse import op_name
from tvm_qfp8.relay_passes.quantize_linear import QuantizeLinear
from tvm_qfp8.relay_passes.recognize_padding import RecognizePadding
from tvm_qfp8.topi.pad import MODES


def calls(mod):
    return [binding.value for binding in mod["main"].body.blocks[0].bindings]


def paddings(mod):
    return [call for call in calls(mod) if op_name(call) == "relax.nn.pad"]


@pytest.mark.parametrize("isa", RUNS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "shape, widths",
    [
        ((1, 5, 4, 3), (1, 2, 3, 0)),
        ((2, 7, 9, 70), (0, 0, 2, 2)),
        ((3, 40, 40, 33), (3, 3, 3, 3)),
        ((1, 4, 6, 1), (0, 3, 0, 5)),
    ],
)
def test_images_of_float32(isa, mode, shape, widths):
    top, bottom, left, right = widths

    def body(emit, x):
        y = emit(R.nn.pad(emit(R.negative(x)), [0, 0, *widths, 0, 0], pad_mode=mode))
        return emit(R.square(y))

    x = random(*shape)
    (found,) = tvm_qfp8.compile(build({"x": (shape, "float32")}, body), TARGETS[isa]).run({"x": x})
    expected = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)), MODES[mode])
    np.testing.assert_array_equal(found, np.square(expected))


@pytest.mark.parametrize(
    "shape, widths", [((2, 6, 5), [0, 0, 2, 1, 1, 1]), ((1, 4, 5, 6), [0, 0, 1, 1, 0, 0, 2, 0])]
)
def test_other_tensors(shape, widths):
    """Channels too, and of any rank."""
    x = random(*shape)
    mod = build({"x": (shape, "float32")}, lambda emit, x: emit(R.nn.pad(x, widths, pad_mode="reflect")))
    expected = np.pad(x, np.reshape(widths, (-1, 2)), "reflect")
    np.testing.assert_array_equal(tvm_qfp8.compile(mod).run({"x": x})[0], expected)


@pytest.mark.parametrize("mode", MODES)
def test_convolutions_read_padded_codes(mode):
    """The encode moves before the padding, and the bits are those of padding before it."""

    def network(with_pad):
        def body(emit, x):
            y = emit(R.nn.relu(emit(R.nn.conv2d(x, constant(8, 3, 3, 4, scale=0.3), padding=1, **NHWC))))
            if with_pad:
                y = emit(R.nn.pad(y, [0, 0, 1, 1, 1, 1, 0, 0], pad_mode=mode))
            return emit(R.nn.conv2d(y, constant(5, 3, 3, 8, seed=1, scale=0.2), **NHWC))

        return build({"x": ((1, 9, 10, 4), "float32")}, body)

    samples = [{"x": random(1, 9, 10, 4, seed=seed)} for seed in range(4)]
    quantized = QuantizeLinear(calibrate(network(True), samples))(network(True))
    assert "custom" in str(paddings(quantized)[-1].ty.dtype)
    module = tvm_qfp8.compile(network(True), calibration=samples)
    for sample in samples:
        (expected,), (found,) = evaluate(network(True), sample), module.run(sample)
        assert found.shape == (1, 9, 10, 5)
        assert np.square(found - expected).sum() < 10**-3 * np.square(expected).sum()


def onnx_network(mode, pads, shape=(1, 2, 6, 7), opset=18):
    """A file with one padding."""
    nodes = [helper.make_node("Pad", ["x", "pads"], ["y"], mode=mode)]
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)]
    numbers = [helper.make_tensor("pads", onnx.TensorProto.INT64, [len(pads)], pads)]
    graph = helper.make_graph(nodes, "padding", inputs, outputs, numbers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


@pytest.mark.parametrize(
    "mode, name, opset",
    [("reflect", "reflect", 11), ("edge", "edge", 18), ("wrap", "wrap", 19), ("reflect", "reflect", 21)],
)
def test_files(mode, name, opset):
    file = onnx_network(mode, [0, 0, 1, 2, 0, 1, 0, 3], opset=opset)
    assert len(paddings(load_model(file).mod)) == 1
    x = random(1, 2, 6, 7)
    expected = np.pad(x, ((0, 0), (0, 1), (1, 0), (2, 3)), name)
    np.testing.assert_array_equal(tvm_qfp8.compile(file).run({"x": x})[0], expected)


def test_a_reflection_behind_the_other_edge_is_refused():
    of_axes = onnx_network("reflect", [6, 0])
    of_axes.graph.node[0].input.extend(["", "axes"])
    of_axes.graph.initializer.append(helper.make_tensor("axes", onnx.TensorProto.INT64, [1], [-2]))
    of_attribute = onnx_network("reflect", [0, 0, 6, 0, 0, 0, 0, 0], opset=10)
    of_attribute.graph.node[0].input.pop()
    of_attribute.graph.node[0].attribute.append(helper.make_attribute("pads", [0, 0, 6, 0, 0, 0, 0, 0]))
    for file in (onnx_network("reflect", [0, 0, 6, 0, 0, 0, 0, 0]), of_axes, of_attribute):
        with pytest.raises(UnsupportedOperatorError, match="reflections of .* on a shape of"):
            tvm_qfp8.compile(file)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("separate", [True, False])
def test_places_taken_along_axes_are_padding(mode, separate):
    def body(emit, x):
        y = x
        for axis, widths in ((3, (1, 2)), (2, (2, 0))):
            places = np.pad(np.arange(x.ty.shape[axis].value), widths, MODES[mode])
            y = emit(R.take(y, relax.const(places), axis=axis, mode="wrap"))
        return emit(R.add(y, emit(R.mean(y, [1, 2, 3], keepdims=True)))) if separate else y

    mod = build({"x": ((1, 3, 5, 6), "float32")}, body)
    (padding,) = paddings(RecognizePadding()(mod))
    assert [int(width) for width in padding.attrs.pad_width] == [0, 0, 0, 0, 2, 0, 1, 2]
    x = {"x": random(1, 3, 5, 6)}
    np.testing.assert_array_equal(evaluate(RecognizePadding()(mod), x)[0], evaluate(mod, x)[0])


@pytest.mark.parametrize("places", [[0, 1, 2, 3], [2, 1, 0, 1, 2, 3, 3], [1, 0, 1, 2], [0, 0, 1, 2, 3, 2]])
def test_other_places_are_none(places):
    def body(emit, x):
        return emit(R.take(x, relax.const(np.array(places)), axis=2, mode="wrap"))

    assert not paddings(RecognizePadding()(build({"x": ((1, 3, 4, 6), "float32")}, body)))
