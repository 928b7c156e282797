"""The cases as onnxruntime graphs, inputs and outputs bound to memory so that a call copies nothing.

float32: ``Conv`` and ``MatMul``. int8: ``QLinearConv`` channels last and ``QLinearMatMul``, activations uint8 in and
out, weights int8 per channel, as onnxruntime's quantization page advises; ``MatMulInteger`` too, which leaves int32.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from kernel_bench.cases import Case, Convolution, Dense
from kernel_bench.ours import Run

MICROSOFT = "com.microsoft"
OPSET = 21


class _Graph:
    """Nodes and initializers under way; ``value`` is the last result."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.value = "x"

    def constant(self, array: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def node(self, operator: str, *inputs: str, **attributes) -> None:
        result = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [result], **attributes))
        self.value = result

    def runner(self, x: np.ndarray, out_type: int) -> Run:
        in_type = helper.np_dtype_to_tensor_dtype(x.dtype)
        graph = helper.make_graph(
            self.nodes,
            "case",
            [helper.make_tensor_value_info("x", in_type, x.shape)],
            [helper.make_tensor_value_info(self.value, out_type, None)],
            self.constants,
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        result = session.run(None, {"x": x})[0]
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
        binding.bind_ortvalue_output(self.value, onnxruntime.OrtValue.ortvalue_from_numpy(result))
        return lambda: session.run_with_iobinding(binding)


def runners(case: Case) -> dict[str, Run]:
    """The peers of a case."""
    if isinstance(case, Dense):
        return {
            "onnxruntime float32": _dense_float(case),
            "onnxruntime int8 QLinearMatMul": _dense_qlinear(case),
            "onnxruntime int8 MatMulInteger": _dense_integer(case),
        }
    return {
        "onnxruntime float32": _convolution_float(case),
        "onnxruntime int8 QLinearConv": _convolution_qlinear(case),
    }


def empty_runner() -> Run:
    """Next to nothing to do: what a call costs."""
    graph = _Graph()
    graph.node("Abs", "x")
    return graph.runner(np.ones(16, np.float32), TensorProto.FLOAT)


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _scaled(rng: np.random.Generator, shape: tuple[int, ...], depth: int) -> np.ndarray:
    """Weights that keep the size of activations through a chain."""
    return (rng.standard_normal(shape) / np.sqrt(depth)).astype(np.float32)


def _dense_float(case: Dense) -> Run:
    graph, rng = _Graph(), _rng()
    for _ in range(case.layers):
        weight = graph.constant(_scaled(rng, (case.depth, case.columns), case.depth))
        graph.node("MatMul", graph.value, weight)
    return graph.runner(rng.standard_normal((case.rows, case.depth)).astype(np.float32), TensorProto.FLOAT)


def _codes(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def _int8_weights(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(-127, 128, shape, dtype=np.int8)


def _dense_qlinear(case: Dense) -> Run:
    graph, rng = _Graph(), _rng()
    scale, zero = graph.constant(np.float32(0.05)), graph.constant(np.uint8(128))
    weight_scale = graph.constant(np.full(case.columns, 1e-3, np.float32))
    weight_zero = graph.constant(np.zeros(case.columns, np.int8))
    for _ in range(case.layers):
        weight = graph.constant(_int8_weights(rng, (case.depth, case.columns)))
        graph.node("QLinearMatMul", graph.value, scale, zero, weight, weight_scale, weight_zero, scale, zero)
    return graph.runner(_codes(rng, (case.rows, case.depth)), TensorProto.UINT8)


def _dense_integer(case: Dense) -> Run:
    """Layers stand side by side: an int32 result cannot be the next one's input."""
    graph, rng = _Graph(), _rng()
    zero = graph.constant(np.uint8(128))
    for _ in range(case.layers):
        graph.node("MatMulInteger", "x", graph.constant(_int8_weights(rng, (case.depth, case.columns))), zero)
    if case.layers > 1:
        graph.node("Concat", *(node.output[0] for node in graph.nodes), axis=0)
    return graph.runner(_codes(rng, (case.rows, case.depth)), TensorProto.INT32)


def _convolution_attributes(case: Convolution) -> dict:
    return {
        "kernel_shape": [case.kernel] * 2,
        "pads": [case.padding] * 4,
        "strides": [case.stride] * 2,
        "group": case.groups,
    }


def _weight_shape(case: Convolution, index: int) -> tuple[int, ...]:
    channels, outputs = case.layer_channels(index)
    return (outputs, channels // case.groups, case.kernel, case.kernel)


def _convolution_float(case: Convolution) -> Run:
    graph, rng = _Graph(), _rng()
    for index in range(case.layers):
        shape = _weight_shape(case, index)
        weight = graph.constant(_scaled(rng, shape, int(np.prod(shape[1:]))))
        graph.node("Conv", graph.value, weight, **_convolution_attributes(case))
    x = rng.standard_normal((1, case.channels, case.size, case.size)).astype(np.float32)
    return graph.runner(x, TensorProto.FLOAT)


def _convolution_qlinear(case: Convolution) -> Run:
    graph, rng = _Graph(), _rng()
    scale, zero = graph.constant(np.float32(0.05)), graph.constant(np.uint8(0))
    for index in range(case.layers):
        shape = _weight_shape(case, index)
        graph.node(
            "QLinearConv",
            graph.value,
            scale,
            zero,
            graph.constant(_int8_weights(rng, shape)),
            graph.constant(np.full(shape[0], 1e-3, np.float32)),
            graph.constant(np.zeros(shape[0], np.int8)),
            scale,
            zero,
            domain=MICROSOFT,
            channels_last=1,
            **_convolution_attributes(case),
        )
    return graph.runner(_codes(rng, (1, case.size, case.size, case.channels)), TensorProto.UINT8)
