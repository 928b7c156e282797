"""Small ONNX models that tests make."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def model(nodes, inputs, outputs, constants, opset=17) -> onnx.ModelProto:
    """A checked model; ``inputs`` and ``outputs`` are {name: shape} of float32."""
    values = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in group.items()]
        for group in (inputs, outputs)
    ]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "test", *values, tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(made)
    return made


def cnn(opset=17, batch: int | str = 1) -> onnx.ModelProto:
    """Conv, BatchNorm, ReLU6, depthwise, residual, pooling, Gemm, softmax; input ``image`` (1, 3, 16, 16)."""
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    constants = {
        "w1": normal(16, 3, 3, 3, scale=0.3),
        "gamma": np.abs(normal(16)) + 0.5,
        "beta": normal(16),
        "mean": normal(16),
        "var": np.abs(normal(16)) + 0.5,
        "low": np.float32(0),
        "high": np.float32(6),
        "w2": normal(16, 1, 3, 3, scale=0.4),
        "b2": normal(16),
        "w3": normal(16, 16, 1, 1, scale=0.3),
        "w4": normal(10, 16, scale=0.3),
        "b4": normal(10),
    }
    node = helper.make_node
    nodes = [
        node("Conv", ["image", "w1"], ["c1"], pads=[1, 1, 1, 1], strides=[2, 2]),
        node("BatchNormalization", ["c1", "gamma", "beta", "mean", "var"], ["n1"]),
        node("Clip", ["n1", "low", "high"], ["r1"]),
        node("Conv", ["r1", "w2", "b2"], ["c2"], pads=[1, 1, 1, 1], group=16),
        node("Relu", ["c2"], ["r2"]),
        node("Conv", ["r2", "w3"], ["c3"]),
        node("Add", ["c3", "r1"], ["a3"]),
        node("GlobalAveragePool", ["a3"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "w4", "b4"], ["logits"], transB=1),
        node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    outputs = {"probabilities": (batch, 10)}
    return model(nodes, {"image": (batch, 3, 16, 16)}, outputs, constants, opset)


def images(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Inputs for ``cnn``."""
    rng = np.random.default_rng(seed)
    return [{"image": rng.standard_normal((1, 3, 16, 16)).astype(np.float32)} for _ in range(count)]


def run_reference(made: onnx.ModelProto, inputs) -> list[np.ndarray]:
    """ONNX's own reference implementation."""
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(made).run(None, dict(inputs))
