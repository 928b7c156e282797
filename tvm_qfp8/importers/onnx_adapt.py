"""Operators written the way TVM's importer reads them."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from tvm_qfp8.importers.onnx_operators import attributes, inferred_shapes


def adapt_operators(model: onnx.ModelProto) -> None:
    """``Pow`` with exponents of the base's type, ``Resize`` over all axes; in place."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Pow" and node.input[1] in constants:
            _float_exponent(model, node, numpy_helper.to_array(constants[node.input[1]]))
        elif node.op_type == "Resize" and "axes" in attributes(node):
            _all_axes(model, node, constants)


def _float_exponent(model: onnx.ModelProto, node: onnx.NodeProto, exponent: np.ndarray) -> None:
    """Bases are float32 in all networks of interest; powers of integers stay as they are."""
    if exponent.dtype.kind not in "iu" or _is_integer(model, node.input[0]):
        return
    name = f"{node.output[0]}_exponent"
    model.graph.initializer.append(numpy_helper.from_array(exponent.astype(np.float32), name))
    node.input[1] = name


def _is_integer(model: onnx.ModelProto, name: str) -> bool:
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    return types.get(name, onnx.TensorProto.FLOAT) != onnx.TensorProto.FLOAT


def _all_axes(model: onnx.ModelProto, node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> None:
    shape = inferred_shapes(model).get(node.input[0], [])
    axes = [axis % len(shape) for axis in attributes(node)["axes"]] if shape and all(shape) else []
    if attributes(node).get("keep_aspect_ratio_policy", b"stretch") != b"stretch" or not axes:
        return
    for position, neutral in ((2, np.ones(len(shape), np.float32)), (3, np.array(shape, np.int64))):
        if len(node.input) > position and node.input[position] in constants:
            neutral[axes] = numpy_helper.to_array(constants[node.input[position]])
            name = f"{node.output[0]}_{position}"
            model.graph.initializer.append(numpy_helper.from_array(neutral, name))
            node.input[position] = name
            kept = [a for a in node.attribute if a.name != "axes"]
            del node.attribute[:]
            node.attribute.extend(kept)
