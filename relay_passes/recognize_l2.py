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
    """No less than this; NaN where it is no number."""


@tvm.transform.module_pass(opt_level=0, name="RecognizeL2")
class RecognizeL2:
    """Rewrite ``main``; what the normalisation was made of is left to dead code elimination."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


class _Rewriter(MainRewriter):
    def replacement(self, _var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        for x, norm in self._quotients(value):
            found = self._floor_and_axis(x, norm)
            if found is not None:
                return qfp8_ops.l2_normalize(self.expression(x), *found)
        return None

    def _quotients(self, value: relax.Expr) -> list[tuple[relax.Expr, _Root]]:
        """(x, root) where the value is x divided by the root, or times its inverse."""
        if op_name(value) == "relax.divide":
            return [(value.args[0], root) for root in self._root(value.args[1])]
        if op_name(value) != "relax.multiply":
            return []
        return [
            (x, root)
            for x, other in (value.args, reversed(value.args))
            for root in self._inverse_root(self._call(other))
        ]

    def _inverse_root(self, call: Any) -> list[_Root]:
        if op_name(call) == "relax.broadcast_to":
            call = self._call(call.args[0])
        if op_name(call) == "relax.rsqrt":
            return self._root_of(call.args[0])
        if op_name(call) == "relax.divide" and self._number(call.args[0]) == 1.0:
            return self._root(call.args[1])
        return []

    def _root(self, expr: relax.Expr) -> list[_Root]:
        """What a norm is the root of, at most one; it may be no less than a floor."""
        call = self._call(expr)
        if op_name(call) == "relax.broadcast_to":
            call = self._call(call.args[0])
        floor = 0.0
        if op_name(call) == "relax.maximum":
            floor, call = self._number(call.args[1]) or math.nan, self._call(call.args[0])
        if op_name(call) != "relax.sqrt" and not (
            op_name(call) == "relax.power" and self._number(call.args[1]) == 0.5
        ):
            return []
        return [_Root(total, max(floor, inner)) for total, inner in self._root_of(call.args[0])]

    def _root_of(self, expr: relax.Expr) -> list[_Root]:
        """The same of what the root is taken of."""
        call = self._call(expr)
        if op_name(call) != "relax.maximum":
            return [_Root(call, 0.0)]
        least = self._number(call.args[1])
        return [_Root(self._call(call.args[0]), math.sqrt(least))] if least is not None and least >= 0 else []

    def _floor_and_axis(self, x: relax.Expr, root: _Root) -> tuple[float, int] | None:
        """The least norm that the quotient divides by, 0 without one, and the axis; None if it is none."""
        total: Any = root.total
        if not static_shape(x) or str(x.ty.dtype) != "float32" or 0 in shape_of(x) or not root.floor >= 0.0:
            return None
        if op_name(total) != "relax.sum" or not total.attrs.keepdims or total.attrs.axis is None:
            return None
        axes = [int(axis) % len(shape_of(x)) for axis in total.attrs.axis]
        if len(axes) != 1 or not self._is_square(self._call(total.args[0]), x):
            return None
        return root.floor, axes[0]

    def _is_square(self, call: Any, x: relax.Expr) -> bool:
        name = op_name(call)
        if name == "relax.multiply":
            return all(argument.same_as(x) for argument in call.args)
        if name != "relax.square" and not (name == "relax.power" and self._number(call.args[1]) == 2.0):
            return False
        base = self._call(call.args[0])
        return call.args[0].same_as(x) or (op_name(base) == "relax.abs" and base.args[0].same_as(x))

    def _call(self, expr: relax.Expr) -> Any:
        """What a variable is bound to; None for anything else."""
        return self.definition.get(expr) if isinstance(expr, relax.Var) else None

    def _number(self, expr: relax.Expr) -> float | None:
        constant = self.constant(expr) if isinstance(expr, relax.Var | GenericConst) else None
        if constant is None or constant.value.numpy().size != 1:
            return None
        return float(constant.value.numpy().reshape(()))
