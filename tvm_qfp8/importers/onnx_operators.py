"""Operators of an ONNX model that TVM does not import as they are.

What ONNX defines by other operators is written out; the rest, and variants that TVM imports with other numbers, is
refused with its node.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType
from typing import Any

import onnx
from onnx import helper, numpy_helper
from onnx.inliner import inline_local_functions, inline_selected_functions

from tvm_qfp8.errors import UnsupportedOperatorError
from tvm_qfp8.importers.onnx_pad import check_reflection
from tvm_qfp8.importers.onnx_qdq import constant_tensors
from tvm_qfp8.importers.onnx_recurrent import CONVERTERS, check_recurrent

ADVICE = "replace it in the model by supported operators, or cut the model before it"
COORDINATES = {
    b"half_pixel", b"pytorch_half_pixel", b"align_corners", b"asymmetric", b"tf_half_pixel_for_nn",
}  # fmt: skip
LARGEST_SHAPE = 1024
"""Elements; larger constants are weights, smaller ones may say what shape a tensor is to have."""


def expand_operators(model: onnx.ModelProto) -> onnx.ModelProto:
    """Functions of the model, and operators new to TVM that ONNX defines by others, written out."""
    if model.functions:
        model = inline_local_functions(model)
    # TVM's Attention is the one of onnxruntime; LpNormalization is written out by adapt_operators.
    known = (known_operators() - {"Attention"}) | {"LpNormalization"}
    for _ in range(3):  # a definition may itself hold new operators
        unknown = {node.op_type for node in model.graph.node if node.domain in ("", "ai.onnx")} - known
        if not unknown:
            break
        try:
            names = [("", name) for name in unknown]
            model = inline_selected_functions(_with_types(model), names, inline_schema_functions=True)
        except RuntimeError:  # the inliner gives up on open types; the operators are refused later, by name
            break
    return model


def _with_types(model: onnx.ModelProto) -> onnx.ModelProto:
    """Definitions may depend on types, which the inliner does not take from initializers."""
    typed = onnx.shape_inference.infer_shapes(model)
    typed.graph.value_info.extend(
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in typed.graph.initializer
    )
    return typed


def known_operators() -> set[str]:
    """What TVM's importer has a converter for, or gets one."""
    from tvm.relax.frontend.onnx.onnx_frontend import _get_convert_map

    return {*_get_convert_map(), *CONVERTERS}


def check_operators(model: onnx.ModelProto) -> None:
    """Refuse what the importer does not know and the variants that it gets wrong.

    Raises
    ------
    UnsupportedOperatorError
        Names operator and node.
    """
    known = known_operators()
    shapes = inferred_shapes(model)
    constants = constant_tensors(model)
    for node in model.graph.node:
        if node.op_type not in known or (node.op_type == "Attention" and node.domain in ("", "ai.onnx")):
            raise UnsupportedOperatorError(f"{describe(node)} is not supported; {ADVICE}")
        variant = _VARIANTS.get(node.op_type, lambda *_: None)(node, shapes, constants)
        if variant:
            raise UnsupportedOperatorError(f"{describe(node)} with {variant} is not supported; {ADVICE}")


def describe(node: onnx.NodeProto) -> str:
    """``operator Conv (node 'conv1')``; nodes without a name go by their output."""
    return f"operator {node.op_type} (node {node.name or ', '.join(filter(None, node.output))!r})"


def failed_node(traceback: TracebackType | None) -> onnx.NodeProto | None:
    """The node that TVM's importer was at when it raised: its errors do not say, but its frames do."""
    found = None
    while traceback is not None:
        node = traceback.tb_frame.f_locals.get("node")
        if isinstance(node, onnx.NodeProto):
            found = node
        traceback = traceback.tb_next
    return found


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a node as Python values."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def inferred_shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Shapes of all tensors that shape inference knows; 0 for a dimension that it does not."""
    graph = onnx.shape_inference.infer_shapes(_without_weights(model), data_prop=True).graph
    values = [
        v for v in (*graph.value_info, *graph.input, *graph.output) if v.type.tensor_type.HasField("shape")
    ]
    return {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights as inputs of their shapes: inference copies the model three times, and needs no weight's values."""
    weights = [t for t in model.graph.initializer if math.prod(t.dims) > LARGEST_SHAPE]
    if not weights:
        return model
    names = {tensor.name for tensor in weights}
    bare = onnx.ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions
    )
    graph, full = bare.graph, model.graph
    graph.node.extend(full.node)
    graph.output.extend(full.output)
    graph.value_info.extend(full.value_info)
    graph.initializer.extend(t for t in full.initializer if t.name not in names)
    graph.input.extend(value for value in full.input if value.name not in names)
    graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in weights)
    return bare


def _extra_outputs(count: int, what: str) -> Callable:
    return lambda node, *_: what if any(node.output[count:]) else None


def _mode(name: str, supported: tuple[bytes, ...]) -> Callable:
    def check(node: onnx.NodeProto, *_) -> str | None:
        mode = attributes(node).get(name, supported[0])
        return None if mode in supported else f"{name}={mode.decode()}"

    return check


def _resize(node: onnx.NodeProto, shapes: dict, constants: dict) -> str | None:
    given = attributes(node)
    mode = given.get("coordinate_transformation_mode", b"half_pixel")
    if mode not in COORDINATES:
        return f"coordinate_transformation_mode={mode.decode()}"
    if given.get("antialias", 0):
        return "antialias"
    size, scales = shapes.get(node.input[0], []), constants.get(node.input[2] if len(node.input) > 2 else "")
    if scales is not None:
        # TVM derives the scale from the sizes, which is another one if the size was rounded.
        exact = [s * float(f) for s, f in zip(size, numpy_helper.to_array(scales), strict=False)]
        if any(abs(extent - round(extent)) > 1e-3 for extent in exact):
            return f"scales that give the fractional size {exact}"
    return None


def _batch_norm(node: onnx.NodeProto, *_) -> str | None:
    return "training_mode=1" if attributes(node).get("training_mode", 0) else None


_VARIANTS: dict[str, Callable] = {
    "MaxPool": _extra_outputs(1, "its indices as output"),
    "LayerNormalization": _extra_outputs(1, "mean and deviation as outputs"),
    "BatchNormalization": _batch_norm,
    "RoiAlign": _mode("mode", (b"avg",)),
    "SpaceToDepth": _mode("mode", (b"DCR",)),
    "Resize": _resize,
    "Pad": check_reflection,
    "NonMaxSuppression": lambda *_: "as many results as it finds (shapes are static)",
    **dict.fromkeys(CONVERTERS, check_recurrent),
}
