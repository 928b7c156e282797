"""Models that were quantized before: QuantizeLinear and DequantizeLinear are taken out, their scales ignored.

A quantizer that finds a ReLU before a tensor whose codes begin at 0 drops it, because QuantizeLinear saturates
there (onnxruntime's does). So such a tensor keeps its saturation, as ``Clip``.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# After these a tensor is within its range anyway: activations themselves, and what only moves their values.
MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather", "Identity")
BOUNDED = (
    "Relu", "Clip", "Sigmoid", "HardSigmoid", "Softmax", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat",
    "Split", "Pad", "Resize", *(name for name in MOVES if name != "Identity"),
)  # fmt: skip


def constant_tensors(model: onnx.ModelProto) -> dict[str, TensorProto]:
    """Initializers and the values of Constant nodes, by name."""
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            found.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    return found


def strip_quantization(model: onnx.ModelProto) -> list[str]:
    """Make a QDQ model float32 again, in place; a note for the report, if there was anything to do."""
    graph = model.graph
    constants = constant_tensors(model)
    codes = {v.name for v in graph.input if v.type.tensor_type.elem_type != TensorProto.FLOAT}
    for node in graph.node:
        if _gathers_codes(node, constants) or (node.op_type in MOVES and node.input[0] in codes):
            codes.update(node.output)
    producer = {name: node.op_type for node in graph.node for name in node.output}
    rename: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    removed = 0
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = rename.get(name, name)
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            nodes.append(node)
            continue
        removed += 1
        source, result = node.input[0], node.output[0]
        if node.op_type == "DequantizeLinear" and source in constants:
            array = _dequantize(node, constants, numpy_helper.to_array(constants[source]).astype(np.float32))
            graph.initializer.append(numpy_helper.from_array(array, result))
        elif node.op_type == "DequantizeLinear" and source in codes:
            nodes += _dequantize_codes(graph, node, constants)
        elif node.op_type == "QuantizeLinear" and producer.get(source, "Relu") not in BOUNDED:
            nodes += _saturation(model, node, constants, rename)
        else:
            rename[result] = source
    _name_outputs(graph, nodes, rename)
    del graph.node[:]
    graph.node.extend(nodes)
    if not removed:
        return []
    return [
        f"{removed} QuantizeLinear/DequantizeLinear nodes were removed: imported as float32, their scales ignored"
    ]


def _name_outputs(graph: onnx.GraphProto, nodes: list[onnx.NodeProto], rename: dict[str, str]) -> None:
    for output in graph.output:
        if output.name in rename:
            nodes.append(helper.make_node("Identity", [rename[output.name]], [output.name]))
            output.type.tensor_type.elem_type = TensorProto.FLOAT


def _scale_and_zero(node: onnx.NodeProto, constants: dict[str, TensorProto]) -> tuple[np.ndarray, np.ndarray]:
    scale = numpy_helper.to_array(constants[node.input[1]])
    if len(node.input) > 2 and node.input[2]:
        return scale.astype(np.float32), numpy_helper.to_array(constants[node.input[2]])
    return scale.astype(np.float32), np.zeros(scale.shape, np.uint8)


def _dequantize(node: onnx.NodeProto, constants: dict[str, TensorProto], x: np.ndarray) -> np.ndarray:
    """(x - zero_point) * scale of a constant: per tensor, along ``axis``, or by blocks of it."""
    scale, zero = _scale_and_zero(node, constants)
    zero = zero.astype(np.float32)
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    if scale.ndim == x.ndim and scale.ndim > 1:
        block = -(-x.shape[axis] // scale.shape[axis])
        scale, zero = (a.repeat(block, axis).take(range(x.shape[axis]), axis) for a in (scale, zero))
    elif scale.size > 1:
        shape = [-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return ((x - zero) * scale).astype(np.float32)


def _gathers_codes(node: onnx.NodeProto, constants: dict[str, TensorProto]) -> bool:
    """An embedding whose table is quantized; its rows are scaled after the look-up."""
    table = constants.get(node.input[0]) if node.op_type == "Gather" else None
    return table is not None and table.data_type in (TensorProto.INT8, TensorProto.UINT8)


def _dequantize_codes(
    graph: onnx.GraphProto, node: onnx.NodeProto, constants: dict[str, TensorProto]
) -> list[onnx.NodeProto]:
    """Integers that no node of the model made are scaled in float32."""
    name = node.output[0]
    for suffix, array in zip(("scale", "zero"), _scale_and_zero(node, constants), strict=True):
        graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), f"{name}_{suffix}"))
    return [
        helper.make_node("Cast", [node.input[0]], [f"{name}_float"], to=TensorProto.FLOAT),
        helper.make_node("Sub", [f"{name}_float", f"{name}_zero"], [f"{name}_centred"]),
        helper.make_node("Mul", [f"{name}_centred", f"{name}_scale"], [name]),
    ]


def _saturation(
    model: onnx.ModelProto, node: onnx.NodeProto, constants: dict[str, TensorProto], rename: dict[str, str]
) -> list[onnx.NodeProto]:
    """``Clip`` where the codes begin at zero; else nothing is left of the node."""
    source, result = node.input[0], node.output[0]
    if node.input[1] in constants:
        scale, zero = _scale_and_zero(node, constants)
        if scale.size == 1 and zero.dtype in (np.uint8, np.int8, np.uint16, np.int16):
            limits = np.iinfo(zero.dtype)
            if int(zero.reshape(-1)[0]) == limits.min:
                high = float(scale.reshape(-1)[0]) * (limits.max - limits.min)
                return _clip(model, source, result, high)
    rename[result] = source
    return []


def _clip(model: onnx.ModelProto, source: str, result: str, high: float) -> list[onnx.NodeProto]:
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if opset < 11:
        return [helper.make_node("Clip", [source], [result], min=0.0, max=high)]
    bounds = [f"{result}_min", f"{result}_max"]
    for name, bound in zip(bounds, (0.0, high), strict=True):
        model.graph.initializer.append(numpy_helper.from_array(np.array(bound, np.float32), name))
    return [helper.make_node("Clip", [source, *bounds], [result])]
