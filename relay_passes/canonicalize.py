"""Removes operators that do nothing and brings bounds to one form.

Runs right after import. Before::

    lv = R.add(x, R.const(0.0))                   # also x * 1, x / 1, reshape or cast to what x is, dropout ...
    lv1 = R.maximum(lv, R.const(0.0))
    lv2 = R.minimum(lv1, R.const(6.0))

After::

    lv2 = R.clip(x, 0, 6)

A lower bound of 0 alone is ``R.nn.relu``; another single bound, or one that is an array, is a maximum or minimum.
PReLU of one slope is ``R.nn.leakyrelu``; powers of 2, 0.5 and -0.5 are ``R.square``, ``R.sqrt`` and ``R.rsqrt``.
A matmul over no values is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import tvm
from tvm import relax

from tvm_qfp8.relay_passes.fuse import op_name, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter

RESHAPES = (
    "relax.reshape", "relax.squeeze", "relax.expand_dims", "relax.flatten", "relax.nn.batch_flatten",
    "relax.broadcast_to", "relax.astype", "relax.strided_slice",
)  # fmt: skip


POWERS: dict[float | None, Callable] = {2.0: relax.op.square, 0.5: relax.op.sqrt, -0.5: relax.op.rsqrt}


@tvm.transform.module_pass(opt_level=0, name="Canonicalize")
class Canonicalize:
    """Rewrite ``main``."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


class _Rewriter(MainRewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.bounded: dict[relax.Var, tuple[relax.Expr, float, float]] = {}
        self._handlers: dict[str, Callable[[relax.Call], relax.Expr | None]] = {
            "relax.add": lambda value: self._neutral(value, 0.0, swap=True),
            "relax.subtract": lambda value: self._neutral(value, 0.0),
            "relax.multiply": lambda value: self._neutral(value, 1.0, swap=True),
            "relax.divide": lambda value: self._neutral(value, 1.0),
            "relax.power": lambda value: self._neutral(value, 1.0),
            "relax.permute_dims": self._permute,
            "relax.concat": self._concat,
            "relax.nn.pad": self._pad,
            **dict.fromkeys(RESHAPES, self._same_type),
        }

    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        handler = self._handlers.get(op_name(value))
        same = handler(value) if handler else None
        if same is not None:
            self.variables[var] = self.expression(same)
            if same in self.bounded:
                self.bounded[var] = self.bounded[same]
            return
        bounds = self._bounds(value)
        power = self._power(value)
        if power is not None:
            self.variables[var] = self.builder.emit(power, var.name)
        elif bounds is not None:
            self._emit_bounds(var, *bounds)
        elif op_name(value) == "relax.matmul":
            self._matmul(var, value)
        elif op_name(value) == "relax.take" and str(value.attrs.mode) == "fast":
            # Indices outside would read foreign memory; wrapped, those below 0 count from the end, as NumPy's do.
            x, indices = map(self.expression, value.args)
            wrapped = relax.op.take(x, indices, value.attrs.axis, mode="wrap")
            self.variables[var] = self.builder.emit(wrapped, var.name)
        elif op_name(value) == "relax.nn.prelu" and (slope := self._number(value.args[1])) is not None:
            call = relax.op.nn.leakyrelu(self.expression(value.args[0]), slope)
            self.variables[var] = self.builder.emit(call, var.name)
        else:
            self.keep(var, value)

    def _matmul(self, var: relax.Var, value: relax.Call) -> None:
        """Constant weights lose dimensions of 1 in front; a sum of no products is 0."""
        shape = static_shape(value)
        empty = any(0 in (static_shape(operand) or ()) for operand in value.args)
        if empty and shape is not None and 0 not in shape:
            self.variables[var] = self.builder.emit(relax.op.zeros(shape, value.ty.dtype), var.name)
            return
        x, weight = value.args[0], self.constant(value.args[1])
        array = None if weight is None else weight.value.numpy()
        rank = len(static_shape(x) or ())
        if array is None or not 2 < array.ndim <= rank or array.shape[:-2] != (1,) * (array.ndim - 2):
            self.keep(var, value)
            return
        matrix = relax.const(array.reshape(array.shape[-2:]), str(array.dtype))
        call = relax.op.matmul(self.expression(x), matrix)
        self.variables[var] = self.builder.emit(call, var.name)

    # -- operators that do nothing: each handler gives the argument that is the result --------------------------

    def _number(self, expr: relax.Expr) -> float | None:
        """The value of a constant of equal elements."""
        constant = self.constant(expr)
        if constant is None:
            return None
        array = constant.value.numpy()
        first = array.reshape(-1)[:1]
        return float(first[0]) if array.size and (array == first).all() else None

    def _neutral(self, value: relax.Call, number: float, swap: bool = False) -> relax.Expr | None:
        a, b = value.args
        for x, other in [(a, b), (b, a)] if swap else [(a, b)]:
            if self._number(other) == number and _same_tensor(x, value):
                return x
        return None

    def _same_type(self, value: relax.Call) -> relax.Expr | None:
        x = value.args[0]
        if op_name(value) == "relax.strided_slice" and not _all_forward(value):
            return None
        return x if _same_tensor(x, value) else None

    def _pad(self, value: relax.Call) -> relax.Expr | None:
        return None if any(int(width) for width in value.attrs.pad_width) else value.args[0]

    def _permute(self, value: relax.Call) -> relax.Expr | None:
        axes = value.attrs.axes
        x = value.args[0]
        if axes is None or not isinstance(x, relax.Var):
            return None
        rank = len(axes)
        return x if [int(axis) % rank for axis in axes] == list(range(rank)) else None

    def _concat(self, value: relax.Call) -> relax.Expr | None:
        """The only part that is not empty, as in rotary embeddings of all channels."""
        parts = value.args[0].fields if isinstance(value.args[0], relax.Tuple) else []
        return next((part for part in parts if _same_tensor(part, value)), None)

    # -- powers -----------------------------------------------------------------------------------------------

    def _power(self, value: relax.Expr) -> relax.Call | None:
        """Squares and roots, which are exact and need no table."""
        if op_name(value) != "relax.power" or str(value.ty.dtype) != "float32":
            return None
        function = POWERS.get(self._number(value.args[1]))
        if function is None or not _same_tensor(value.args[0], value):
            return None
        return function(self.expression(value.args[0]))

    # -- bounds -----------------------------------------------------------------------------------------------

    def _bounds(self, value: relax.Expr) -> tuple[relax.Expr, float, float] | None:
        """(x, low, high) where the value is x between two numbers; a chain of bounds is one pair."""
        name = op_name(value)
        if name not in ("relax.clip", "relax.maximum", "relax.minimum", "relax.nn.relu"):
            return None
        x, low, high = value.args[0], -math.inf, math.inf
        if str(getattr(value.ty, "dtype", "")) != "float32" or static_shape(value) is None:
            return None
        if name == "relax.clip":
            low, high = float(value.args[1].value), float(value.args[2].value)
        elif name == "relax.nn.relu":
            low = 0.0
        else:
            bound = self._number(value.args[1])
            if bound is None:
                x, bound = value.args[1], self._number(value.args[0])
            if bound is None or math.isnan(bound) or not _same_tensor(x, value):
                return None
            low, high = (bound, high) if name == "relax.maximum" else (low, bound)
        if self.constant(x) is not None:
            return None
        if isinstance(x, relax.Var) and x in self.bounded:
            x, inner_low, inner_high = self.bounded[x]
            low, high = min(max(inner_low, low), high), min(max(inner_high, low), high)
        return x, low, high

    def _emit_bounds(self, var: relax.Var, x: relax.Expr, low: float, high: float) -> None:
        self.bounded[var] = (x, low, high)
        source = self.expression(x)
        if low == -math.inf and high == math.inf:
            self.variables[var] = source
            return
        if high == math.inf:
            call = (
                relax.op.nn.relu(source)
                if low == 0
                else relax.op.maximum(source, relax.const(low, "float32"))
            )
        elif low == -math.inf:
            call = relax.op.minimum(source, relax.const(high, "float32"))
        else:
            call = relax.op.clip(source, low, high)
        self.variables[var] = self.builder.emit(call, var.name)


def _same_tensor(x: relax.Expr, value: relax.Expr) -> bool:
    shape = static_shape(value)
    return shape is not None and static_shape(x) == shape and x.ty.dtype == value.ty.dtype


def _all_forward(value: relax.Call) -> bool:
    """Whether a slice has no negative step (a reversal keeps the shape)."""
    if len(value.args) < 5:
        return True
    return all(int(step.value) > 0 for step in value.args[4].fields)
