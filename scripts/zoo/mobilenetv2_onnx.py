"""MobileNetV2 (Sandler et al. 2018) as an ONNX graph from torchvision's state dict, as an exporter leaves it in
training-preserving mode: Conv without bias, BatchNormalization, Clip for ReLU6."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 13
EPSILON = 1e-5


class _Graph:
    """Nodes and initializers in the making; each method adds what it names and returns the output's name."""

    def __init__(self, weights: Mapping[str, np.ndarray]) -> None:
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self.constants = {
            "zero": numpy_helper.from_array(np.float32(0), "zero"),
            "six": numpy_helper.from_array(np.float32(6), "six"),
        }

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        output = f"/{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output[1:], **attributes))
        return output

    def weight(self, name: str) -> str:
        self.constants.setdefault(name, numpy_helper.from_array(self.weights[name], name))
        return name

    def conv_norm(self, x: str, conv: str, norm: str, stride: int = 1) -> str:
        out, per_group, kernel, _ = self.weights[f"{conv}.weight"].shape
        depthwise = per_group == 1
        x = self.op(
            "Conv",
            x,
            self.weight(f"{conv}.weight"),
            dilations=[1, 1],
            group=out if depthwise else 1,
            kernel_shape=[kernel, kernel],
            pads=[kernel // 2] * 4,
            strides=[stride, stride],
        )
        statistics = [
            self.weight(f"{norm}.{part}") for part in ("weight", "bias", "running_mean", "running_var")
        ]
        return self.op("BatchNormalization", x, *statistics, epsilon=EPSILON)

    def relu6(self, x: str) -> str:
        return self.op("Clip", x, "zero", "six")

    def block(self, x: str, name: str, stride: int) -> str:
        """Inverted residual: expand 1x1 (absent in the first), depthwise 3x3, project 1x1 without activation."""
        y, part = x, 0
        while f"{name}.conv.{part}.0.weight" in self.weights:
            depthwise = self.weights[f"{name}.conv.{part}.0.weight"].shape[1] == 1
            y = self.conv_norm(
                y, f"{name}.conv.{part}.0", f"{name}.conv.{part}.1", stride if depthwise else 1
            )
            y, part = self.relu6(y), part + 1
        y = self.conv_norm(y, f"{name}.conv.{part}", f"{name}.conv.{part + 1}")
        kept = self.weights[f"{name}.conv.0.0.weight"].shape[1 if part == 2 else 0]
        same = stride == 1 and kept == self.weights[f"{name}.conv.{part}.weight"].shape[0]
        return self.op("Add", x, y) if same else y


# First block of each of the stages 2 ... 7 with stride 2 (table 2 of the paper).
_STRIDED = {2, 4, 7, 14}


def mobilenet_v2(weights: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """ONNX model: ``input (1, 3, 224, 224)`` to ``logits (1, 1000)``, opset 13, from torchvision's names of weights."""
    graph = _Graph(weights)
    x = graph.relu6(graph.conv_norm("input", "features.0.0", "features.0.1", 2))
    for i in range(1, 18):
        x = graph.block(x, f"features.{i}", 2 if i in _STRIDED else 1)
    x = graph.relu6(graph.conv_norm(x, "features.18.0", "features.18.1"))
    x = graph.op("Flatten", graph.op("GlobalAveragePool", x), axis=1)
    graph.op("Gemm", x, graph.weight("classifier.1.weight"), graph.weight("classifier.1.bias"), transB=1)
    graph.nodes[-1].output[0] = "logits"
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "mobilenet_v2",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 224, 224])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 1000])],
            list(graph.constants.values()),
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=8,
    )
    onnx.checker.check_model(model)
    return model
