"""Partition: which operators of a quantized program become one kernel.

Runs on the quantized program, before kernels are written. Nothing is rewritten here; the result is a list of
steps in execution order::

    conv2d -> add(residual) -> clip -> encode     ==>  Group(anchor=conv2d, members=[conv2d, add, clip, encode])
    reshape                                       ==>  Single(reshape)

An anchor is a linear operator, a row operator (softmax, LayerNorm), a pooling, a concatenation of channels, or an
elementwise operator that could not join an earlier group. An elementwise operator or an encode joins the group of an
argument if it has the shape of the anchor's output and all its other arguments exist before the anchor runs: then the
group's kernel can run in the anchor's place. Only elementwise operators read what ``decode`` gives, from
the codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tvm import ir, relax

from tvm_qfp8.topi.elementwise import ELEMENTWISE

LINEAR = ("relax.qfp8.matmul", "relax.qfp8.conv2d", "relax.qfp8.batch_matmul", "relax.qfp8.take")
ROW = (
    "relax.nn.softmax",
    "relax.nn.log_softmax",
    "relax.nn.layer_norm",
    "relax.nn.rms_norm",
    "relax.qfp8.l2_normalize",
)
GLOBAL_POOL = {"relax.mean": "mean", "relax.max": "max"}
"""Reductions over height and width, and their kind."""
POOL = ("relax.nn.max_pool2d", "relax.nn.avg_pool2d", *GLOBAL_POOL)
POINTWISE = (*ELEMENTWISE, "relax.qfp8.interpolate", "relax.qfp8.halve", "relax.qfp8.encode")


@dataclass
class Group:
    """Bindings that become one kernel; ``members[0]`` is the anchor."""

    members: list[tuple[relax.Var, relax.Call]]
    outputs: list[relax.Var] = field(default_factory=list)
    encode_rows: tuple[relax.Var, relax.Call] | None = None
    """The encode with a scale for each row of what a member gives, see ``encoded_rows``."""

    @property
    def anchor(self) -> relax.Call:
        return self.members[0][1]


@dataclass
class Single:
    """A binding that stays as it is."""

    var: relax.Var
    value: relax.Expr


def read_by(step: Group | Single) -> set[relax.Var]:
    """What a step reads of others."""
    if isinstance(step, Single):
        return set(relax.analysis.free_vars(step.value))
    found = {var for _, call in step.members for var in relax.analysis.free_vars(call)}
    return found - {var for var, _ in step.members}


def op_name(value: Any) -> str:
    """The name of a called operator, or an empty string."""
    if isinstance(value, relax.Call) and isinstance(value.op, ir.Op):
        return value.op.name
    return ""


def static_shape(expr: relax.Expr) -> tuple[int, ...] | None:
    """The shape of a tensor as ints, None if it is not static or not a tensor."""
    shape = getattr(expr.ty, "shape", None)
    if not isinstance(shape, relax.ShapeExpr) or not all(hasattr(extent, "value") for extent in shape):
        return None
    return tuple(int(extent) for extent in shape)


def shape_of(expr: relax.Expr) -> tuple[int, ...]:
    """The shape of a static tensor."""
    shape = static_shape(expr)
    assert shape is not None, f"{expr} is not a static tensor"
    return shape


def tensor_arguments(call: relax.Call) -> list[relax.Expr]:
    """The arguments of a call that are tensors (``clip`` has its bounds as scalars)."""
    return [argument for argument in call.args if isinstance(argument.ty, relax.TensorType)]


def _is_float_or_code(expr: relax.Expr) -> bool:
    dtype = str(getattr(expr.ty, "dtype", ""))
    return dtype == "float32" or dtype.startswith("custom[qfp8")


def _pointwise(value: relax.Expr) -> bool:
    if op_name(value) == "relax.nn.prelu" and int(value.attrs.axis) not in (-1, len(value.ty.shape) - 1):
        return False  # slopes of another axis than the last do not broadcast as operands do
    return op_name(value) in POINTWISE and all(
        _is_float_or_code(argument) and static_shape(argument) is not None
        for argument in tensor_arguments(value)
    )


def normalized_axis(value: relax.Expr) -> int | None:
    """The one axis of a float32 tensor that softmax, log-softmax, LayerNorm, RMSNorm or L2 normalisation goes over."""
    if op_name(value) not in ROW or not _has_floats(value.args[0]):
        return None
    shape = shape_of(value.args[0])
    if op_name(value) == "relax.qfp8.l2_normalize":
        axes = [int(value.args[2].value)]
    elif op_name(value) in ("relax.nn.layer_norm", "relax.nn.rms_norm"):
        axes = [int(axis) for axis in value.attrs.axes]
    else:
        axes = [int(value.attrs.axis)]
    return axes[0] % len(shape) if len(axes) == 1 else None


def _has_floats(x: relax.Expr) -> bool:
    """A float32 tensor of known shape, not empty."""
    return str(x.ty.dtype) == "float32" and bool(static_shape(x)) and 0 not in shape_of(x)


def is_group_norm(value: relax.Expr) -> bool:
    """GroupNorm as its kernel takes it: in NHWC, without scale and shift."""
    if op_name(value) != "relax.nn.group_norm" or not _has_floats(value.args[0]):
        return False
    attrs = value.attrs
    layout = int(attrs.channel_axis), [int(axis) for axis in attrs.axes]
    return layout == (3, [1, 2]) and not attrs.scale and not attrs.center


def is_row_operator(value: relax.Expr) -> bool:
    """Softmax or a norm as the row kernels take it: over the last axis, or the one before it, or GroupNorm's."""
    if is_group_norm(value):
        return True
    axis = normalized_axis(value)
    return axis is not None and axis >= len(shape_of(value.args[0])) - 2


def is_pooling(value: relax.Expr) -> bool:
    """NHWC pooling over windows, or the mean or maximum over height and width."""
    name = op_name(value)
    if name not in POOL or str(value.args[0].ty.dtype) != "float32" or static_shape(value.args[0]) is None:
        return False
    if name in GLOBAL_POOL:
        shape, axes = shape_of(value.args[0]), value.attrs.axis
        if len(shape) != 4 or axes is None:
            return False
        reduced = {int(axis) % 4 for axis in axes}
        return reduced <= {1, 2} and all(shape[axis] == 1 for axis in {1, 2} - reduced)
    attrs = value.attrs
    plain = not attrs.ceil_mode and str(attrs.layout) == "NHWC" and str(attrs.out_layout) in ("", "NHWC")
    return plain and all(int(d) == 1 for d in attrs.dilation)


def joins_channels(value: relax.Expr) -> bool:
    """A concatenation of float32 tensors along their last axis."""
    if op_name(value) != "relax.concat" or str(value.ty.dtype) != "float32" or not static_shape(value):
        return False
    parts = parts_of(value)
    last = int(value.attrs.axis) % len(shape_of(value)) == len(shape_of(value)) - 1
    return last and all(static_shape(part) and 0 not in shape_of(part) for part in parts)


def parts_of(value: relax.Call) -> list[relax.Expr]:
    """What a concatenation joins."""
    return [*value.args[0].fields]


def _can_anchor(value: relax.Expr) -> bool:
    return (
        op_name(value) in LINEAR
        or is_row_operator(value)
        or is_pooling(value)
        or joins_channels(value)
        or _pointwise(value)
    )


def results_of(function: relax.Function) -> set[relax.Var]:
    """The variables that a function of one block returns."""
    found: set[relax.Var] = set()
    relax.analysis.post_order_visit(
        function.body.body, lambda e: found.add(e) if isinstance(e, relax.Var) else None
    )
    return found


def partition(block: relax.DataflowBlock, results: set[relax.Var]) -> list[Group | Single]:
    """Steps of one dataflow block; ``results`` are the variables that live on after it."""
    steps: list[Group | Single] = []
    decodes: dict[relax.Var, relax.Call] = {}
    position: dict[relax.Var, int] = {}
    group_of: dict[relax.Var, Group] = {}

    for binding in block.bindings:
        var, value = binding.var, binding.value
        if op_name(value) == "relax.qfp8.decode":
            decodes[var] = value
        elif op_name(value) in POINTWISE and not decodes.keys().isdisjoint(value.args):
            value = relax.Call(value.op, [decodes.get(a, a) for a in value.args], value.attrs, value.ty_args)
            relax.expr._update_type(value, binding.value.ty)
        group = _group_to_join(value, position, group_of, steps) if _pointwise(value) else None
        if group is None and _can_anchor(value):
            group = Group([])
            steps.append(group)
        if group is None:
            steps.append(Single(var, value))
            position[var] = len(steps) - 1
        else:
            group.members.append((var, value))
            group_of[var] = group
            position[var] = next(i for i, step in enumerate(steps) if step is group)

    _find_outputs(steps, results)
    return steps


def _find_outputs(steps: list[Group | Single], results: set[relax.Var]) -> None:
    """A group's outputs are what other steps read or what lives on."""
    read_outside = set(results)
    for step in steps:
        inner = {var for var, _ in step.members} if isinstance(step, Group) else set()
        values = [value for _, value in step.members] if isinstance(step, Group) else [step.value]
        for value in values:
            read_outside.update(var for var in relax.analysis.free_vars(value) if var not in inner)
    for step in steps:
        if isinstance(step, Group):
            step.outputs = [var for var, _ in step.members if var in read_outside]


def _group_to_join(value, position: dict, group_of: dict, steps: list) -> Group | None:
    candidates = [a for a in tensor_arguments(value) if isinstance(a, relax.Var) and a in group_of]
    if not candidates:
        return None
    latest = max(candidates, key=lambda a: position[a])
    group = group_of[latest]
    if static_shape(group.members[0][0]) != static_shape(value):
        return None
    if str(latest.ty.dtype) != "float32":
        return None
    place = position[latest]
    for argument in tensor_arguments(value):
        argument = argument.args[0] if op_name(argument) == "relax.qfp8.decode" else argument
        if not isinstance(argument, relax.Var) or group_of.get(argument) is group:
            continue
        if position.get(argument, -1) >= place:
            return None
    return group
