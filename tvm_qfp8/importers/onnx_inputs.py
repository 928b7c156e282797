"""Inputs of ONNX models: every dimension becomes a number."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tvm_qfp8.errors import ModelError

BATCH = re.compile(r"batch|^(n|b|bs)$", re.IGNORECASE)
"""What exporters call a batch. An open first dimension of another name may be time, which is no batch."""
NUMBERED = re.compile(r"^(unk__|(p2o\.)?DynamicDimension\.)\d+$")
"""What tf2onnx and paddle2onnx call an open dimension, each another; their frameworks have the batch first."""


def bind_inputs(
    model: onnx.ModelProto,
    values: Mapping[str, np.ndarray | float],
    input_shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, tuple[int, ...]]:
    """Make constants of inputs, in place. A number stands for every element.

    Returns
    -------
    dict
        The shapes of the inputs that are left.

    Raises
    ------
    ModelError
        A name is unknown, or an array has another shape than the input.
    """
    inputs = {value.name: value for value in model.graph.input}
    for name, given in values.items():
        if name not in inputs:
            raise ModelError(f"the model has no input {name!r}; its inputs are {', '.join(inputs)}")
        tensor_type = inputs[name].type.tensor_type
        array = np.asarray(given).astype(helper.tensor_dtype_to_np_dtype(tensor_type.elem_type))
        if name in input_shapes:
            _write(inputs[name], input_shapes[name])
        dims = tensor_type.shape.dim
        if array.ndim == 0 and any(_is_open(dim) for dim in dims):
            raise ModelError(f"input {name!r} is given a number and has open dimensions; give its shape, too")
        if array.ndim == 0:
            array = np.full([dim.dim_value for dim in dims], array)
        _write(inputs[name], array.shape)  # checks it
        model.graph.initializer.append(numpy_helper.from_array(array, name))
        model.graph.input.remove(inputs[name])
    return {name: shape for name, shape in input_shapes.items() if name not in values}


TEXT, TEXT_OPTION = "lengths_up_to(128)", "..128"
"""What to give for the length of a text."""


def fix_input_shapes(model: onnx.ModelProto, input_shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Write the given shapes into the model's inputs, in place.

    Returns
    -------
    str or None
        Without given shapes the name of the batch, if the model leaves nothing else open: inputs are for one sample.

    Raises
    ------
    ModelError
        A name is unknown, a shape contradicts the model, or a dimension stays open.
    """
    # Files of IR version 3 list their weights among the inputs.
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    names = [value.name for value in inputs]
    for name in input_shapes:
        if name not in names:
            raise ModelError(f"the model has no input {name!r}; its inputs are {', '.join(names)}")
    batch = None if input_shapes else _open_batch(inputs)
    for value in model.graph.input:
        if not value.type.HasField("tensor_type"):
            kind = value.type.WhichOneof("value")
            raise ModelError(f"input {value.name!r} is a {kind}; only tensors are supported as inputs")
        if value.name in input_shapes:
            _write(value, input_shapes[value.name])
        elif batch is not None:
            value.type.tensor_type.shape.dim[0].dim_value = 1
    _refuse_open(model.graph.input)
    forget_shapes(model)
    return batch


def _open_batch(inputs: Iterable[onnx.ValueInfoProto]) -> str | None:
    """The name of the first dimension of all inputs, where it is a batch and the only one that is open."""
    names = set()
    for value in inputs:
        dims = value.type.tensor_type.shape.dim
        if not dims or not _is_open(dims[0]) or any(_is_open(dim) for dim in dims[1:]):
            return None
        names.add("batch" if NUMBERED.search(dims[0].dim_param) else dims[0].dim_param)
    name = names.pop() if len(names) == 1 else ""
    return name if BATCH.search(name) else None


def forget_shapes(model: onnx.ModelProto) -> None:
    """Drop recorded shapes of inner values and results: they may name open dimensions or be wrong."""
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")


def _is_open(dim: onnx.TensorShapeProto.Dimension) -> bool:
    """Exporters write an open dimension as a name, as nothing, as 0 or as -1."""
    return dim.dim_value <= 0


def _write(value: onnx.ValueInfoProto, given: tuple[int, ...]) -> None:
    tensor_type = value.type.tensor_type
    dims = tensor_type.shape.dim
    if tensor_type.HasField("shape") and len(given) != len(dims):
        raise ModelError(
            f"input {value.name!r} has {len(dims)} dimensions, the shape given is {tuple(given)}"
        )
    if any(int(extent) < 1 for extent in given):
        raise ModelError(f"input {value.name!r} needs positive dimensions, the shape given is {tuple(given)}")
    for i, (dim, extent) in enumerate(zip(dims, given, strict=False)):
        if not _is_open(dim) and dim.dim_value != extent:
            raise ModelError(
                f"input {value.name!r} has {dim.dim_value} in dimension {i}, the shape given is {tuple(given)}"
            )
    del dims[:]
    dims.extend(onnx.TensorShapeProto.Dimension(dim_value=int(extent)) for extent in given)


def _refuse_open(values: Iterable[onnx.ValueInfoProto]) -> None:
    values = list(values)
    for value in values:
        if not value.type.tensor_type.HasField("shape"):
            raise ModelError(
                f"input {value.name!r} has no shape in the file; give it: input_shapes={{{value.name!r}: (...)}}"
            )
    still_open = [value for value in values if any(map(_is_open, _dims(value)))]
    if not still_open:
        return
    shown = ", ".join(
        f"input {value.name!r} has open dimensions ({', '.join(map(_extent, _dims(value)))})"
        for value in still_open
    )
    # The length of a text, which all inputs that have it name alike, is what a user would like to keep open.
    texts = {
        _dims(value)[axis].dim_param for value in still_open if _is_integer(value) for axis in _lengths(value)
    }
    examples = {value.name: _example(value, texts) for value in still_open}
    shapes = ", ".join(f"{name!r}: ({', '.join(shape)})" for name, shape in examples.items())
    options = " ".join(
        f"--input-shape {name}={','.join(shape).replace(TEXT, TEXT_OPTION)}"
        for name, shape in examples.items()
    )
    raise ModelError(
        f"{shown}; give them, for example input_shapes={{{shapes}}}, on the command line {options}"
    )


def _dims(value: onnx.ValueInfoProto) -> Sequence[onnx.TensorShapeProto.Dimension]:
    return value.type.tensor_type.shape.dim


def _extent(dim: onnx.TensorShapeProto.Dimension) -> str:
    return dim.dim_param or ("?" if _is_open(dim) else str(dim.dim_value))


def _is_integer(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)


def _lengths(value: onnx.ValueInfoProto) -> list[int]:
    """The axes of open dimensions that are no batch."""
    dims = enumerate(_dims(value))
    return [axis for axis, dim in dims if axis and _is_open(dim) and not BATCH.search(dim.dim_param)]


def _example(value: onnx.ValueInfoProto, texts: Container[str]) -> list[str]:
    """A shape that such an input may have; ``texts`` are the names of dimensions that are the length of a text."""
    lengths = _lengths(value)
    length = "224" if len(_dims(value)) == 4 else "128"
    if len(lengths) == 1 and _dims(value)[lengths[0]].dim_param in texts:
        length = TEXT
    return [
        length if axis in lengths else "1" if _is_open(dim) else str(dim.dim_value)
        for axis, dim in enumerate(_dims(value))
    ]
