"""Operators written the way TVM's importer reads them."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tvm_qfp8.importers.onnx_operators import attributes, inferred_shapes


def adapt_operators(model: onnx.ModelProto) -> None:
    """``Pow`` with exponents of the base's type, ``Resize`` over all axes, ``LpNormalization`` as its definition,
    ``Slice`` with its bounds as inputs."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in list(model.graph.node):
        if node.op_type == "Pow" and node.input[1] in constants:
            _float_exponent(model, node, numpy_helper.to_array(constants[node.input[1]]))
        elif node.op_type == "Resize" and "axes" in attributes(node):
            _all_axes(model, node, constants)
        elif node.op_type == "LpNormalization":
            _divided_by_norm(model, node)
        elif node.op_type == "Slice" and "starts" in attributes(node):  # before opset 10
            _bounds_as_inputs(model, node)


def _bounds_as_inputs(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    given = attributes(node)
    given.setdefault("axes", range(len(given["starts"])))
    for name in ("starts", "ends", "axes"):
        values = numpy_helper.from_array(np.array(given[name], np.int64), f"{node.output[0]}_{name}")
        model.graph.initializer.append(values)
        node.input.append(values.name)
    del node.attribute[:]


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


def _divided_by_norm(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    given = attributes(node)
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    norm, positive, axes = f"{node.output[0]}_norm", f"{node.output[0]}_positive", [given.get("axis", -1)]
    name = "ReduceL1" if given.get("p", 2) == 1 else "ReduceL2"
    tiny = 1e-30  # a vector of zeros stays one
    constants = {f"{norm}_axes": np.array(axes), f"{norm}_tiny": np.array(tiny, np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in constants.items())
    if opset < 18:
        reduce = helper.make_node(name, [node.input[0]], [norm], axes=axes)
    else:
        reduce = helper.make_node(name, [node.input[0], f"{norm}_axes"], [norm])
    clip = helper.make_node("Clip", [norm, f"{norm}_tiny"], [positive])
    if opset < 11:
        clip = helper.make_node("Clip", [norm], [positive], min=tiny)
    where = list(model.graph.node).index(node)
    model.graph.node.insert(where, clip)
    model.graph.node.insert(where, reduce)
    node.CopyFrom(helper.make_node("Div", [node.input[0], positive], list(node.output), name=node.name))
