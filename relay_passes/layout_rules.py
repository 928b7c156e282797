"""How each operator is written with channels last; the rules of ``choose_layout``.

A rule gets the rewriter, the variable and its call. It returns the call in NHWC, or None where it does not apply.
Tensors (batch, channels, width) are images of height 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.layout_rules_of_norms import NORMS

TO_NHWC = {4: [0, 2, 3, 1], 3: [0, 2, 1]}
ELEMENTWISE = (
    "add", "subtract", "multiply", "divide", "maximum", "minimum", "power", "negative", "abs", "sign", "sqrt", "rsqrt",
    "square", "exp", "log", "erf", "tanh", "sigmoid", "sin", "cos", "clip", "floor", "ceil", "round", "where",
    "greater", "greater_equal", "less", "less_equal", "equal", "not_equal", "logical_and", "logical_or",
    "logical_not", "isnan", "astype", "nn.relu", "nn.gelu", "nn.gelu_tanh", "nn.silu", "nn.leakyrelu", "nn.softplus",
    "qfp8.mish", "qfp8.selu", "qfp8.elu", "qfp8.celu",
)  # fmt: skip
REDUCTIONS: dict[str, Callable] = {
    "relax.mean": relax.op.mean,
    "relax.max": relax.op.max,
    "relax.min": relax.op.min,
    "relax.sum": relax.op.sum,
    "relax.variance": relax.op.variance,
}
AXIS_OPERATORS: dict[str, Callable] = {
    "relax.nn.softmax": relax.op.nn.softmax,
    "relax.nn.log_softmax": relax.op.nn.log_softmax,
}
Rewriter = Any  # choose_layout's


def nhwc_axis(axis: Any, rank: int) -> int:
    """Where an axis of a tensor of ``rank`` 3 or 4 is in NHWC."""
    where = TO_NHWC[rank].index(int(axis) % rank)
    return where if rank == 4 or where == 0 else where + 1


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]


def _rank(value: relax.Call) -> int:
    return len(static_shape(value.args[0]) or ())


def _pairs(padding: Any) -> list[int]:
    """Padding of a 1-D operator as top, left, bottom, right."""
    values = _ints(padding)
    return [0, values[0], 0, values[-1]]


def _spatial(attrs: Any, names: tuple[str, ...], rank: int) -> dict[str, list[int]]:
    """Attributes over the spatial axes; a 1-D operator gets a 1 (for padding a 0) for its height."""
    found = {}
    for name in names:
        values = _ints(getattr(attrs, name))
        if rank == 3:
            values = (
                _pairs(values) if name == "padding" else [0 if name == "output_padding" else 1, values[0]]
            )
        found[name] = values
    return found


def convolution(rewriter: Rewriter, _var: relax.Var, value: relax.Call) -> relax.Call | None:
    """conv1d and conv2d with constant weights; OIHW becomes OHWI."""
    attrs, weight, rank = value.attrs, rewriter.constant(value.args[1]), _rank(value)
    layouts = {4: ("NCHW", "OIHW"), 3: ("NCW", "OIW")}
    if weight is None or (str(attrs.data_layout), str(attrs.kernel_layout)) != layouts.get(rank):
        return None
    array = weight.value.numpy()
    array = array if rank == 4 else array[:, :, None]
    return relax.op.nn.conv2d(
        rewriter.channels_last(value.args[0], rank),
        relax.const(np.ascontiguousarray(array.transpose(0, 2, 3, 1))),
        **_spatial(attrs, ("strides", "padding", "dilation"), rank),
        groups=int(attrs.groups),
        data_layout="NHWC",
        kernel_layout="OHWI",
    )


def weights_to_ohwi(rewriter: Rewriter, value: relax.Call) -> relax.Call | None:
    """A conv2d that is in NHWC already, with weights in another layout."""
    attrs, weight = value.attrs, rewriter.constant(value.args[1])
    layout = str(attrs.kernel_layout)
    if (
        weight is None
        or str(attrs.data_layout) != "NHWC"
        or sorted(layout) != sorted("OHWI")
        or layout == "OHWI"
    ):
        return None
    array = weight.value.numpy().transpose([layout.index(axis) for axis in "OHWI"])
    return relax.op.nn.conv2d(
        rewriter.expression(value.args[0]),
        relax.const(np.ascontiguousarray(array)),
        **_spatial(attrs, ("strides", "padding", "dilation"), 4),
        groups=int(attrs.groups),
        data_layout="NHWC",
        kernel_layout="OHWI",
    )


def transposed_convolution(rewriter: Rewriter, _var: relax.Var, value: relax.Call) -> relax.Call | None:
    """conv1d_transpose and conv2d_transpose with constant weights, which stay in IOHW."""
    attrs, weight, rank = value.attrs, rewriter.constant(value.args[1]), _rank(value)
    layouts = {4: ("NCHW", "IOHW"), 3: ("NCW", "IOW")}
    if weight is None or (str(attrs.data_layout), str(attrs.kernel_layout)) != layouts.get(rank):
        return None
    array = weight.value.numpy()
    return relax.op.nn.conv2d_transpose(
        rewriter.channels_last(value.args[0], rank),
        relax.const(array if rank == 4 else np.ascontiguousarray(array[:, :, None])),
        **_spatial(attrs, ("strides", "padding", "output_padding", "dilation"), rank),
        groups=int(attrs.groups),
        data_layout="NHWC",
        kernel_layout="IOHW",
    )


def elementwise(rewriter: Rewriter, var: relax.Var, value: relax.Call) -> relax.Call | None:
    """All tensors turned, constants at once; an argument of fewer dimensions must be a constant."""
    rank = len(static_shape(var) or ())
    arguments = []
    for argument in value.args:
        turned = argument
        if isinstance(argument.ty, relax.TensorType):
            turned = rewriter.channels_last(argument, rank)
        if turned is None:
            return None
        arguments.append(turned)
    return relax.Call(value.op, arguments, value.attrs, value.ty_args)


def trained(rewriter: Rewriter, _var: relax.Var, value: relax.Call) -> relax.Call:
    """The mark of a layer follows its result; its scales have no layout."""
    y = rewriter.channels_last(value.args[0], _rank(value))
    return relax.Call(value.op, [y, *value.args[1:]], value.attrs)


def batchnorm_input(rewriter: Rewriter, _var: relax.Var, value: relax.Call) -> relax.Call:
    """The mark of what a BatchNorm layer receives says where its channels are."""
    rank = _rank(value)
    number, axis = (int(argument) for argument in value.args[1:])
    return qfp8_ops.batchnorm_input(
        rewriter.channels_last(value.args[0], rank), number, nhwc_axis(axis, rank)
    )


def prelu(rewriter: Rewriter, _var: relax.Var, value: relax.Call) -> relax.Call | None:
    """A slope per channel, which is the last axis then."""
    rank = _rank(value)
    if int(value.attrs.axis) % rank != 1 or rewriter.constant(value.args[1]) is None:
        return None
    return relax.op.nn.prelu(rewriter.channels_last(value.args[0], rank), value.args[1], axis=3)


def pooling(rewriter: Rewriter, _var: relax.Var, value: relax.Call) -> relax.Call | None:
    """Maximum and average pooling, 1-D and 2-D."""
    attrs, rank = value.attrs, _rank(value)
    if str(attrs.layout) != {4: "NCHW", 3: "NCW"}.get(rank):
        return None
    make = relax.op.nn.max_pool2d if "max_pool" in op_name(value) else relax.op.nn.avg_pool2d
    return make(
        rewriter.channels_last(value.args[0], rank),
        **_spatial(attrs, ("pool_size", "strides", "padding", "dilation"), rank),
        ceil_mode=bool(attrs.ceil_mode),
        count_include_pad=bool(attrs.count_include_pad),
        layout="NHWC",
    )


def global_pooling(rewriter: Rewriter, _var: relax.Var, value: relax.Call) -> relax.Call | None:
    """Adaptive average pooling to one pixel is a mean."""
    size = value.attrs.output_size
    if size is None or set(_ints(size)) != {1}:
        return None
    return relax.op.mean(rewriter.channels_last(value.args[0], _rank(value)), [1, 2], keepdims=True)


def resize(rewriter: Rewriter, var: relax.Var, value: relax.Call) -> relax.Call | None:
    """Nearest, linear and cubic; the module's result is turned back while it is small."""
    attrs = value.attrs
    grows = math.prod(shape_of(value)) > math.prod(shape_of(value.args[0]))
    is_result = all(isinstance(rewriter.definition[reader], relax.Var) for reader in rewriter.readers[var])
    if str(attrs.layout) != "NCHW" or (grows and is_result):
        return None
    names = ("method", "coordinate_transformation_mode", "rounding_method", "cubic_alpha", "cubic_exclude")
    kept = {name: getattr(attrs, name) for name in (*names, "extrapolation_value", "out_dtype")}
    roi = [float(bound) for bound in attrs.roi]
    return relax.op.image.resize2d(
        rewriter.channels_last(value.args[0], 4), value.args[1], roi=roi, layout="NHWC", **kept
    )


def reduction(rewriter: Rewriter, _var: relax.Var, value: relax.Call) -> relax.Call | None:
    """Over any axes if they stay as 1; else if the axes that are left keep their order."""
    rank = _rank(value)
    axes = range(rank) if value.attrs.axis is None else _ints(value.attrs.axis)
    turned = sorted(nhwc_axis(axis, rank) for axis in axes)
    left = [axis for axis in TO_NHWC[rank] if axis not in [int(a) % rank for a in axes]]
    if not value.attrs.keepdims and left != sorted(left):
        return None
    if rank == 3 and not value.attrs.keepdims:
        turned = sorted({*turned, 1})  # the height goes too
    return REDUCTIONS[op_name(value)](
        rewriter.channels_last(value.args[0], rank), turned, keepdims=bool(value.attrs.keepdims)
    )


def along_axis(rewriter: Rewriter, _var: relax.Var, value: relax.Call) -> relax.Call:
    """Softmax."""
    rank = _rank(value)
    x = rewriter.channels_last(value.args[0], rank)
    return AXIS_OPERATORS[op_name(value)](x, axis=nhwc_axis(value.attrs.axis, rank))


def concat(rewriter: Rewriter, var: relax.Var, value: relax.Call) -> relax.Call | None:
    """Parts that are not in NHWC yet are turned."""
    rank = len(static_shape(var) or ())
    turned = [rewriter.channels_last(part, rank) for part in value.args[0].fields]
    if any(part is None for part in turned):
        return None
    return relax.op.concat(turned, nhwc_axis(value.attrs.axis, rank))


def split(rewriter: Rewriter, _var: relax.Var, value: relax.Call) -> relax.Call:
    """Along any axis; gives a tuple."""
    rank = _rank(value)
    sections = value.attrs.indices_or_sections
    where = int(sections) if not hasattr(sections, "__len__") else _ints(sections)
    return relax.op.split(
        rewriter.channels_last(value.args[0], rank), where, nhwc_axis(value.attrs.axis, rank)
    )


def strided_slice(rewriter: Rewriter, _var: relax.Var, value: relax.Call) -> relax.Call:
    """Along any axes."""
    rank = _rank(value)
    axes, *bounds = [_ints(field.value for field in argument.fields) for argument in value.args[1:]]
    turned = [nhwc_axis(axis, rank) for axis in axes]
    return relax.op.strided_slice(rewriter.channels_last(value.args[0], rank), turned, *bounds)


def take(rewriter: Rewriter, _var: relax.Var, value: relax.Call) -> relax.Call | None:
    """A list of places along one axis: torch's programs hold reflection padding and rolls so."""
    x, indices = value.args[:2]
    if value.attrs.axis is None or len(static_shape(indices) or ()) != 1 or x not in rewriter.nhwc:
        return None
    return relax.op.take(
        rewriter.channels_last(x, _rank(value)),
        rewriter.expression(indices),
        nhwc_axis(value.attrs.axis, _rank(value)),
        mode=str(value.attrs.mode),
    )


def pad(rewriter: Rewriter, _var: relax.Var, value: relax.Call) -> relax.Call:
    """Any mode."""
    rank, attrs = _rank(value), value.attrs
    widths = [0] * 8
    for axis, pair in enumerate(zip(*[iter(_ints(attrs.pad_width))] * 2, strict=True)):
        where = nhwc_axis(axis, rank)
        widths[2 * where : 2 * where + 2] = pair
    x = rewriter.channels_last(value.args[0], rank)
    return relax.op.nn.pad(x, widths, pad_mode=str(attrs.pad_mode), pad_value=float(attrs.pad_value))


def view(rewriter: Rewriter, var: relax.Var, value: relax.Call) -> relax.Call | None:
    """A reshape that only drops, adds or moves a height or width of 1."""
    before, after = static_shape(value.args[0]) or (), static_shape(var) or ()
    if not {len(before), len(after)} <= {3, 4} or before[:2] != after[:2]:
        return None
    if [n for n in before[2:] if n != 1] != [n for n in after[2:] if n != 1]:
        return None
    image = after if len(after) == 4 else (*after[:2], 1, after[2])
    return relax.op.reshape(
        rewriter.channels_last(value.args[0], len(before)), [image[axis] for axis in TO_NHWC[4]]
    )


STARTS: dict[str, Callable] = {
    "relax.nn.conv1d": convolution,
    "relax.nn.conv2d": convolution,
    "relax.nn.conv1d_transpose": transposed_convolution,
    "relax.nn.conv2d_transpose": transposed_convolution,
}
FOLLOWS: dict[str, Callable] = {
    **{f"relax.{name}": elementwise for name in ELEMENTWISE},
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(AXIS_OPERATORS, along_axis),
    "relax.qfp8.trained": trained,
    "relax.qfp8.batchnorm_input": batchnorm_input,
    "relax.nn.prelu": prelu,
    "relax.nn.max_pool1d": pooling,
    "relax.nn.max_pool2d": pooling,
    "relax.nn.avg_pool1d": pooling,
    "relax.nn.avg_pool2d": pooling,
    "relax.nn.adaptive_avg_pool1d": global_pooling,
    "relax.nn.adaptive_avg_pool2d": global_pooling,
    "relax.image.resize2d": resize,
    **NORMS,
    "relax.concat": concat,
    "relax.split": split,
    "relax.strided_slice": strided_slice,
    "relax.take": take,
    "relax.nn.pad": pad,
    **dict.fromkeys(("relax.reshape", "relax.squeeze", "relax.expand_dims"), view),
}
