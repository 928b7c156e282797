"""Models that were quantized before: QuantizeLinear and DequantizeLinear are taken out, their scales ignored."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper


def strip_quantization(model: onnx.ModelProto) -> list[str]:
    """Make a QDQ model float32 again, in place; a note for the report, if there was anything to do."""
    graph = model.graph
    constants = {t.name: t for t in graph.initializer}
    rename: dict[str, str] = {}
    removed = 0
    for node in list(graph.node):
        if node.op_type == "QuantizeLinear":
            rename[node.output[0]] = node.input[0]
        elif node.op_type == "DequantizeLinear" and node.input[0] in constants:
            value = _dequantize(node, constants)
            graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
        elif node.op_type == "DequantizeLinear":
            rename[node.output[0]] = node.input[0]
        else:
            continue
        graph.node.remove(node)
        removed += 1

    def resolve(name: str) -> str:
        while name in rename:
            name = rename[name]
        return name

    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = resolve(name)
    produced = {name for node in graph.node for name in node.output}
    for output in graph.output:
        source = resolve(output.name)
        if source != output.name and output.name not in produced:
            graph.node.append(helper.make_node("Identity", [source], [output.name]))
    if not removed:
        return []
    return [
        f"{removed} QuantizeLinear/DequantizeLinear nodes were removed: imported as float32, their scales ignored"
    ]


def _dequantize(node: onnx.NodeProto, constants: dict) -> np.ndarray:
    """(x - zero_point) * scale of a constant, per tensor or along ``axis``."""
    x = numpy_helper.to_array(constants[node.input[0]]).astype(np.float32)
    scale = numpy_helper.to_array(constants[node.input[1]]).astype(np.float32)
    zero = np.zeros_like(scale)
    if len(node.input) > 2 and node.input[2]:
        zero = numpy_helper.to_array(constants[node.input[2]]).astype(np.float32)
    if scale.size > 1:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1) % x.ndim
        shape = [-1 if i == axis else 1 for i in range(x.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return ((x - zero) * scale).astype(np.float32)
