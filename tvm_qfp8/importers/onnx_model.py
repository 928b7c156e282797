"""ONNX files as downloaded: fix shapes, simplify, drop quantization nodes, import."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from tvm_qfp8.errors import ModelError, UnsupportedOperatorError
from tvm_qfp8.importers.imported import Imported
from tvm_qfp8.importers.onnx_inputs import fix_input_shapes
from tvm_qfp8.importers.onnx_padding import explicit_padding
from tvm_qfp8.importers.onnx_qdq import strip_quantization

Shapes = Mapping[str, tuple[int, ...]]


def from_onnx_path(path: Path, input_shapes: Shapes) -> Imported:
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
    return from_onnx_model(model, input_shapes)


def from_onnx_model(model: onnx.ModelProto, input_shapes: Shapes) -> Imported:
    """Import a model; it is not changed."""
    import onnxslim
    from tvm.relax.frontend.onnx import from_onnx

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    _check_weights(fixed)
    fix_input_shapes(fixed, input_shapes)
    notes = strip_quantization(fixed)
    try:
        simple = onnxslim.slim(fixed)
    except Exception as error:  # the simplifier's own errors are of many kinds
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ModelError(f"the ONNX model cannot be simplified: {reason}") from error
    _check_operators(simple)
    explicit_padding(simple)
    inputs = [i.name for i in simple.graph.input]
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in simple.graph.input}
    try:
        mod = from_onnx(simple, shape_dict=shapes, keep_params_in_input=False, sanitize_input_names=False)
    except Exception as error:  # the front end raises whatever its converters do
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise UnsupportedOperatorError(
            f"TVM cannot import the model: {reason}; change that operator in the model or export it with another opset"
        ) from error
    return Imported(mod, inputs, [o.name for o in simple.graph.output], notes)


def _check_weights(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_type not in (
            onnx.TensorProto.FLOAT,
            onnx.TensorProto.DOUBLE,
            onnx.TensorProto.FLOAT16,
        ):
            continue
        array = numpy_helper.to_array(tensor)
        # The lowest float32 is a usual mask value; only NaN is wrong in any constant, infinity in a matrix or filter.
        bad = ~np.isfinite(array) if array.ndim >= 2 else np.isnan(array)
        if bad.any():
            index = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ModelError(
                f"weight {tensor.name!r} is {array[index]} at index {index}; the file is damaged"
            )


def _check_operators(model: onnx.ModelProto) -> None:
    from tvm.relax.frontend.onnx.onnx_frontend import _get_convert_map

    known = set(_get_convert_map())
    for node in model.graph.node:
        if node.op_type not in known:
            where = node.name or (node.output[0] if node.output else "?")
            raise UnsupportedOperatorError(
                f"operator {node.op_type} (node {where!r}) is not supported; replace it in the model by supported "
                "operators, or cut the model before it"
            )
