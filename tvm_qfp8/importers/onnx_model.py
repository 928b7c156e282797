"""ONNX files as downloaded: fix shapes, simplify, drop quantization nodes, import."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tvm
from onnx import numpy_helper, version_converter
from tvm import relax

from tvm_qfp8.errors import ModelError, UnsupportedOperatorError
from tvm_qfp8.importers import onnx_einsum, onnx_pad, onnx_pairwise, onnx_recurrent
from tvm_qfp8.importers.finite_weights import check_finite
from tvm_qfp8.importers.imported import Imported, result_types
from tvm_qfp8.importers.name_layers import LayerNames, node_names
from tvm_qfp8.importers.onnx_adapt import adapt_operators
from tvm_qfp8.importers.onnx_dynamic import strip_dynamic_quantization
from tvm_qfp8.importers.onnx_float32 import to_float32
from tvm_qfp8.importers.onnx_if import check_choices, choose_branches, fold_if
from tvm_qfp8.importers.onnx_inputs import bind_inputs, fix_input_shapes, forget_shapes
from tvm_qfp8.importers.onnx_operators import (
    check_operators,
    describe,
    expand_operators,
    failed_node,
    inferred_shapes,
)
from tvm_qfp8.importers.onnx_padding import explicit_padding
from tvm_qfp8.importers.onnx_qdq import constant_tensors, strip_quantization
from tvm_qfp8.importers.onnx_qlinear import write_out_qlinear
from tvm_qfp8.importers.onnx_stft import write_out_stft

WEIGHTED = (
    "Conv", "ConvTranspose", "MatMul", "Gemm", "BatchNormalization", "DequantizeLinear", "RNN", "GRU", "LSTM",
)  # fmt: skip
KEPT_APART = ["FusionConvBN", "FusionConvTransposeBN"]
"""Fusions left to our own passes: BatchNorm may be recalibrated before it is folded, and is folded in float64."""
Shapes = Mapping[str, tuple[int, ...]]
Params = Mapping[str, np.ndarray | float]
"""Values of inputs that become constants."""


def from_onnx_path(path: Path, params: Params, input_shapes: Shapes) -> Imported:
    """Import a file."""
    if not path.is_file():
        raise ModelError(f"no such file: {path}")
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf and external data raise many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{path} is not a readable ONNX file (truncated?): {reason}") from error
    if not model.graph.node:
        raise ModelError(f"{path} holds no operators (empty or truncated file)")
    return _import(model, params, input_shapes)


def from_onnx_model(model: onnx.ModelProto, params: Params, input_shapes: Shapes) -> Imported:
    """Import a model; it is not changed."""
    own = onnx.ModelProto()
    own.CopyFrom(model)
    return _import(own, params, input_shapes)


def _import(model: onnx.ModelProto, params: Params, input_shapes: Shapes) -> Imported:
    """Import a model that is not needed afterwards: it is changed, then emptied."""
    _check_weights(model)
    layers = node_names(model)  # the simplifier drops some
    batch = fix_input_shapes(model, bind_inputs(model, params, input_shapes))
    write_out_qlinear(model)
    notes = [*strip_dynamic_quantization(model), *strip_quantization(model), *to_float32(model)]
    declared = [copy.deepcopy(value) for value in model.graph.input]
    simple = _simplified(expand_operators(model))
    if simple is not model:
        model.Clear()
    gc.collect()  # the simplifier leaves cycles that hold all weights
    while fold_if(simple) or choose_branches(simple):  # a branch may hold the condition of the next one
        simple = _simplified(expand_operators(simple))
    _keep_inputs(simple, declared)
    adapt_operators(simple)
    write_out_stft(simple)
    explicit_padding(simple)
    check_operators(simple)
    check_choices(simple)
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in simple.graph.input}
    mod = _converted(simple, shapes, layers)
    _check_output_shapes(simple, mod)
    return Imported(mod, list(shapes), [o.name for o in simple.graph.output], notes, batch)


def _keep_inputs(simple: onnx.ModelProto, declared: list[onnx.ValueInfoProto]) -> None:
    """Inputs as the file declares them, in its order: the simplifier drops those of which only the shape is read."""
    left = {value.name: copy.deepcopy(value) for value in simple.graph.input}
    del simple.graph.input[:]
    simple.graph.input.extend(left.get(value.name, value) for value in declared)


def _check_weights(model: onnx.ModelProto) -> None:
    constants = constant_tensors(model)
    weights = {name for node in model.graph.node if node.op_type in WEIGHTED for name in node.input}
    for name, tensor in constants.items():  # one at a time: an array is a copy
        check_finite([(name, numpy_helper.to_array(tensor))], infinity_allowed=name not in weights)


def _simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    """Constants folded, shapes propagated: TVM's importer needs both."""
    simple = _slimmed(model)
    while any(node.op_type == "Shape" for node in simple.graph.node):
        # A shape that is computed hides those behind it, so each round finds some.
        again = _slimmed(simple)
        if len(again.graph.node) >= len(simple.graph.node):
            break
        simple = again
    if any(node.op_type == "Upsample" for node in simple.graph.node):
        simple = version_converter.convert_version(simple, 13)  # to Resize
    forget_shapes(simple)
    return simple


def _slimmed(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxslim

    try:
        return onnxslim.slim(model, skip_fusion_patterns=KEPT_APART)
    except Exception:  # of many kinds
        return model  # TVM may still import it as it is, or name the operator that it cannot


def _converted(model: onnx.ModelProto, shapes: dict[str, list[int]], layers: dict[str, str]) -> tvm.IRModule:
    from tvm.relax.frontend.onnx import from_onnx, onnx_frontend

    names = LayerNames()
    for node in model.graph.node:
        # The simplifier calls what it fused after a result, that of the linear node.
        known = (name for name in (node.name, *node.output) if name in layers)
        node.name = next((layers[name] for name in known), node.name or node.output[0])
    try:
        # The front end prints what it then raises, and warns of outputs without a recorded shape.
        with (
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
            _more_converters(onnx_frontend),
            _noting_names(onnx_frontend.ONNXGraphImporter, names),
        ):
            warnings.simplefilter("ignore")
            mod = from_onnx(model, shape_dict=shapes, keep_params_in_input=False, sanitize_input_names=False)
    except Exception as error:  # the front end raises whatever its converters do
        node = failed_node(error.__traceback__)
        where = "the model" if node is None else describe(node)
        raise UnsupportedOperatorError(
            f"TVM cannot import {where}: {_last_line(error)}; change it in the model or export with another opset"
        ) from error
    return names.given_to(mod)


@contextlib.contextmanager
def _noting_names(importer: Any, names: LayerNames) -> Iterator[None]:
    """Emits what a node becomes, so that it can be named, when it is converted; TVM's front end leaves it for later."""
    convert = importer._convert_operator

    def named(self: Any, operator: str, inputs: Any, attributes: dict, opset: int) -> Any:
        result = convert(self, operator, inputs, attributes, opset)
        if isinstance(result, relax.Call) and isinstance(result.ty, relax.TensorType):
            result = self.bb.emit(result)
        fields = result.fields if isinstance(result, relax.Tuple) else [result]
        names.note(self.bb, fields, attributes["tvm_custom"]["name"])
        return result

    importer._convert_operator = named
    try:
        yield
    finally:
        importer._convert_operator = convert


@contextlib.contextmanager
def _more_converters(front_end: Any) -> Iterator[None]:
    """Our converters beside those of TVM's front end, which looks them up by a function of its own."""
    look_up = front_end._get_convert_map
    ours = onnx_recurrent.CONVERTERS | onnx_pairwise.CONVERTERS | onnx_pad.CONVERTERS | onnx_einsum.CONVERTERS
    front_end._get_convert_map = lambda: look_up() | ours
    try:
        yield
    finally:
        front_end._get_convert_map = look_up


def _check_output_shapes(model: onnx.ModelProto, mod: tvm.IRModule) -> None:
    """ONNX's own shape inference is the witness against variants that TVM imports as something else."""
    inferred = inferred_shapes(model)
    for output, field in zip(model.graph.output, result_types(mod), strict=False):
        expected, shape = inferred.get(output.name), _static(field)
        if expected is not None and shape is not None and 0 not in expected and shape != tuple(expected):
            raise ModelError(
                f"output {output.name!r} has shape {tuple(expected)} in the file and {shape} as TVM imports it; "
                "an operator on the way to it is one that TVM reads in another way"
            )


def _static(type_: relax.TensorType) -> tuple[int, ...] | None:
    extents = getattr(getattr(type_, "shape", None), "values", None)
    if extents is None or not all(hasattr(extent, "value") for extent in extents):
        return None
    return tuple(int(extent) for extent in extents)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
