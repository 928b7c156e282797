"""Half and double precision models become float32: the calibration and the kernels have one float type."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OTHER_FLOATS = {
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
}
TYPE_ATTRIBUTES = (("Cast", "to"), ("EyeLike", "dtype"))


def to_float32(model: onnx.ModelProto) -> list[str]:
    """Change weights, casts and the types of inputs and outputs, in place; a note if there was anything to do."""
    found: set[int] = set()
    for tensor in model.graph.initializer:
        _convert(tensor, found)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                _convert(attribute.t, found)
            elif (node.op_type, attribute.name) in TYPE_ATTRIBUTES and attribute.i in OTHER_FLOATS:
                found.add(attribute.i)
                attribute.i = TensorProto.FLOAT
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type in OTHER_FLOATS:
            found.add(value.type.tensor_type.elem_type)
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    names = sorted(OTHER_FLOATS[kind] for kind in found)
    return [f"{' and '.join(names)} became float32, inputs and outputs too"] if names else []


def _convert(tensor: TensorProto, found: set[int]) -> None:
    if tensor.data_type not in OTHER_FLOATS:
        return
    found.add(tensor.data_type)
    array = numpy_helper.to_array(tensor).astype(np.float32)
    tensor.CopyFrom(
        helper.make_tensor(tensor.name, TensorProto.FLOAT, array.shape, array.tobytes(), raw=True)
    )
