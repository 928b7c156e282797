"""Which places of its arguments an operator reads for some places of its result.

Places of a tensor are one boolean array for each axis; what is read is all that lies in the places of every axis.
``RULES`` maps an operator to ``function(call, places of the result)``, which gives the places of each argument, None
for one that has none, such as an axis. An operator without a rule reads all of its arguments, and so does one whose
rule gives None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.relay_passes.fuse import ROW, op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.simplify_views import VIEWS
from tvm_qfp8.topi.elementwise import ELEMENTWISE

Places = list[np.ndarray]
"""A boolean array for each axis."""

Rule = Callable[[relax.Call, Places], "list[Places | None] | None"]

FUNCTIONS = (
    "relax.tanh", "relax.erf", "relax.sigmoid", "relax.exp", "relax.log", "relax.sin", "relax.cos", "relax.power",
    "relax.nn.gelu", "relax.nn.gelu_tanh", "relax.nn.silu", "relax.nn.softplus", "relax.where", "relax.astype",
    "relax.qfp8.mish", "relax.qfp8.selu", "relax.qfp8.elu", "relax.qfp8.celu",
)  # fmt: skip
"""Of each element alone, beside ``ELEMENTWISE``."""


def all_places(expr: relax.Expr) -> Places:
    """Every place of a tensor of static shape."""
    return [np.ones(extent, bool) for extent in shape_of(expr)]


def no_places(expr: relax.Expr) -> Places:
    """No place of a tensor of static shape."""
    return [np.zeros(extent, bool) for extent in shape_of(expr)]


def _aligned(expr: relax.Expr, places: Sequence[np.ndarray]) -> Places:
    """Of what is broadcast to axes that ``places`` are of."""
    shape = shape_of(expr)
    last = places[len(places) - len(shape) :]
    return [
        mask if extent == len(mask) else np.ones(extent, bool)
        for extent, mask in zip(shape, last, strict=True)
    ]


def _elementwise(call: relax.Call, places: Places) -> list[Places | None]:
    return [None if static_shape(x) is None else _aligned(x, places) for x in call.args]


def _matmul(call: relax.Call, places: Places) -> list[Places | None] | None:
    x, y = call.args
    if min(len(shape_of(x)), len(shape_of(y))) < 2:
        return None
    *batch, rows, columns = places
    depth = np.ones(shape_of(x)[-1], bool)
    return [_aligned(x, [*batch, rows, depth]), _aligned(y, [*batch, depth, columns])]


def _rows(call: relax.Call, places: Places) -> list[Places | None]:
    """Along the axes that an operator sums over all is read; factors and shifts are of these axes only."""
    x, *others = call.args
    if hasattr(call.attrs, "axes"):
        axes = [int(axis) for axis in call.attrs.axes]
    elif hasattr(call.attrs, "axis"):
        axes = [int(call.attrs.axis)]
    else:  # qfp8.l2_normalize
        axes = [int(others[-1].value)]
    read = list(places)
    for axis in axes:
        read[axis] = np.ones(len(read[axis]), bool)
    return [read, *(None if static_shape(other) is None else all_places(other) for other in others)]


def _permute_dims(call: relax.Call, places: Places) -> list[Places | None]:
    axes = call.attrs.axes
    order = range(len(places))[::-1] if axes is None else [int(axis) for axis in axes]
    read = list(places)
    for mask, axis in zip(places, order, strict=True):
        read[axis] = mask
    return [read]


def _view(call: relax.Call, places: Places) -> list[Places | None] | None:
    """Axes that have the same extent and as many elements before them are the same."""
    x = call.args[0]
    ours, theirs = shape_of(call), shape_of(x)
    at = {(math.prod(ours[:axis]), extent): axis for axis, extent in enumerate(ours) if extent > 1}
    found = [at.get((math.prod(theirs[:axis]), extent)) for axis, extent in enumerate(theirs)]
    lost = {axis for axis, mask in enumerate(places) if not mask.all()} - set(found)
    if lost:
        return None
    read = [
        np.ones(extent, bool) if axis is None else places[axis]
        for axis, extent in zip(found, theirs, strict=True)
    ]
    return [read, *([None] * (len(call.args) - 1))]


def _concat(call: relax.Call, places: Places) -> list[Places | None] | None:
    axis = int(call.attrs.axis or 0) % len(places)
    parts = operands(call)
    if not places[axis].all() or any(static_shape(part) is None for part in parts):
        return None
    return [
        [np.ones(shape_of(part)[axis], bool) if at == axis else mask for at, mask in enumerate(places)]
        for part in parts
    ]


def taken(call: relax.Call) -> tuple[int, np.ndarray] | None:
    """The axis that ``take`` or ``strided_slice`` select places of by constants, and the places in their order."""
    x, *constants = call.args
    if call.op.name == "relax.take":
        axis, indices = call.attrs.axis, constants[0]
        if axis is None or not isinstance(indices, GenericConst) or str(call.attrs.mode) != "wrap":
            return None
        axis = int(axis) % len(shape_of(x))
        return axis, indices.value.numpy() % shape_of(x)[axis]
    numbers = [
        [int(number.value) for number in part.fields] for part in constants if isinstance(part, relax.Tuple)
    ]
    if len(numbers) != len(constants) or len(numbers[0]) != 1:
        return None
    (axis,), (begin,), (end,), (step,) = numbers if len(numbers) == 4 else [*numbers, [1]]
    axis %= len(shape_of(x))
    return (axis, np.arange(shape_of(x)[axis])[begin:end:step]) if step > 0 else None


def _take(call: relax.Call, places: Places) -> list[Places | None] | None:
    found = taken(call)
    if found is None:
        return None
    axis, indices = found
    wanted = places[axis : axis + indices.ndim]
    read = [*places[:axis], np.zeros(shape_of(call.args[0])[axis], bool), *places[axis + indices.ndim :]]
    read[axis][indices[np.ix_(*wanted)] if indices.ndim else indices] = True
    return [read, *([None] * (len(call.args) - 1))]


def _gather_elements(call: relax.Call, places: Places) -> list[Places | None] | None:
    x, indices = call.args
    axis = int(call.attrs.axis) % len(places)
    others = [extent for at, extent in enumerate(shape_of(x)) if at != axis]
    if not isinstance(indices, GenericConst) or others != [
        len(mask) for at, mask in enumerate(places) if at != axis
    ]:
        return None
    read = list(places)
    read[axis] = np.zeros(shape_of(x)[axis], bool)
    read[axis][indices.value.numpy()[np.ix_(*places)]] = True
    return [read, None]


RULES: dict[str, Rule] = {
    **dict.fromkeys(set(ELEMENTWISE) - {"relax.nn.prelu"}, _elementwise),
    **dict.fromkeys(FUNCTIONS, _elementwise),
    **dict.fromkeys(ROW, _rows),
    **dict.fromkeys(VIEWS, _view),
    "relax.matmul": _matmul,
    "relax.permute_dims": _permute_dims,
    "relax.concat": _concat,
    "relax.take": _take,
    "relax.strided_slice": _take,
    "relax.gather_elements": _gather_elements,
}


def operands(call: relax.Call) -> list[relax.Expr]:
    """The arguments, those of a concatenation its parts."""
    first = call.args[0] if call.args else None
    return list(first.fields) if isinstance(first, relax.Tuple) else list(call.args)


def read_by(call: relax.Call, places: Places) -> list[Places | None] | None:
    """The places of each operand; None: all of all."""
    rule = RULES.get(op_name(call))
    tensors = [x for x in operands(call) if isinstance(x, relax.Var | GenericConst)]
    if rule is None or any(static_shape(x) is None for x in tensors):
        return None
    return rule(call, places)
