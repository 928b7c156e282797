"""Recognises L2 normalisation over an axis, which no importer has an operator for.

Runs after import. Before (as torch's exporter writes ``functional.normalize``)::

    lv1 = R.power(R.abs(x), 2.0)
    lv2 = R.sum(lv1, axis=[-1], keepdims=True)
    lv3 = R.power(lv2, 0.5)
    lv4 = R.broadcast_to(R.maximum(lv3, 1e-12), ...)      # the floor may be missing
    lv5 = R.divide(x, lv4)

After::

    lv5 = R.qfp8.l2_normalize(x, 1e-12, -1)

TensorFlow multiplies with the inverse root instead, ``R.multiply(x, R.rsqrt(R.maximum(lv2, 1e-12)))``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import tvm
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter


class _Root(NamedTuple):
    total: Any
    """The call that it is the root of."""
    floor: float
    """No less than this."""


@tvm.transform.module_pass(opt_level=0, name="RecognizeL2")
class RecognizeL2:
    """Rewrite ``main``; what the normalisation was made of is left to dead code elimination."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


class _Rewriter(MainRewriter):
    def replacement(self, _var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        for x, root in self._quotients(value):
            found = self._floor_and_axis(x, root)
            if found is not None:
                return qfp8_ops.l2_normalize(self.expression(x), *found)
        return None

    def _quotients(self, value: relax.Expr) -> Iterator[tuple[relax.Expr, _Root]]:
        """(x, root) where the value is x divided by the root, or times its inverse."""
        pairs: list[tuple[relax.Expr, _Root | None]] = []
        if op_name(value) == "relax.divide":
            pairs = [(value.args[0], self._root(value.args[1]))]
        elif op_name(value) == "relax.multiply":
            pairs = [(x, self._inverse_root(other)) for x, other in (value.args, reversed(value.args))]
        return ((x, root) for x, root in pairs if root is not None)

    def _unspread(self, expr: relax.Expr) -> Any:
        """What a variable is bound to, before it is broadcast."""
        call = self.bound(expr)
        return self.bound(call.args[0]) if op_name(call) == "relax.broadcast_to" else call

    def _inverse_root(self, expr: relax.Expr) -> _Root | None:
        call = self._unspread(expr)
        if op_name(call) == "relax.rsqrt":
            return self._root_of(call.args[0])
        if op_name(call) == "relax.divide" and self._number(call.args[0]) == 1.0:
            return self._root(call.args[1])
        return None

    def _root(self, expr: relax.Expr) -> _Root | None:
        """A root, or no less than a floor."""
        call, floor = self._bounded(self._unspread(expr))
        is_root = op_name(call) == "relax.sqrt" or (
            op_name(call) == "relax.power" and self._number(call.args[1]) == 0.5
        )
        found = self._root_of(call.args[0]) if is_root and floor >= 0.0 else None
        return None if found is None else _Root(found.total, max(floor, found.floor))

    def _root_of(self, expr: relax.Expr) -> _Root | None:
        """The root of a value, or of no less than a floor."""
        total, least = self._bounded(self.bound(expr))
        return _Root(total, math.sqrt(least)) if least >= 0.0 else None

    def _bounded(self, call: Any) -> tuple[Any, float]:
        """A call without its lower bound, and the bound: 0 without one, NaN if it is no number."""
        if op_name(call) != "relax.maximum":
            return call, 0.0
        number = self._number(call.args[1])
        return self.bound(call.args[0]), math.nan if number is None else number

    def _floor_and_axis(self, x: relax.Expr, root: _Root) -> tuple[float, int] | None:
        """The least norm that the quotient divides by, 0 without one, and the axis; None if it is none."""
        total = root.total
        if not static_shape(x) or str(x.ty.dtype) != "float32" or 0 in shape_of(x):
            return None
        if op_name(total) != "relax.sum" or not total.attrs.keepdims or total.attrs.axis is None:
            return None
        axes = [int(axis) % len(shape_of(x)) for axis in total.attrs.axis]
        if len(axes) != 1 or not self._is_square(self.bound(total.args[0]), x):
            return None
        return root.floor, axes[0]

    def _is_square(self, call: Any, x: relax.Expr) -> bool:
        name = op_name(call)
        if name == "relax.multiply":
            return all(argument.same_as(x) for argument in call.args)
        if name != "relax.square" and not (name == "relax.power" and self._number(call.args[1]) == 2.0):
            return False
        base = self.bound(call.args[0])
        return call.args[0].same_as(x) or (op_name(base) == "relax.abs" and base.args[0].same_as(x))

    def _number(self, expr: relax.Expr) -> float | None:
        constant = self.constant(expr) if isinstance(expr, relax.Var | GenericConst) else None
        if constant is None or constant.value.numpy().size != 1:
            return None
        return float(constant.value.numpy().reshape(()))
