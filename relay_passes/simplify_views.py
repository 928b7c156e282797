"""Joins reshapes and transpositions that undo each other.

Runs after the layout is chosen, which turns tensors back before operators that it does not follow. Before::

    lv = R.permute_dims(x, axes=[0, 3, 1, 2])     # (1, 7, 7, 64) -> (1, 64, 7, 7)
    lv1 = R.reshape(lv, R.shape([1, 64, 49]))
    lv2 = R.permute_dims(lv1, axes=[0, 2, 1])

After::

    lv2 = R.reshape(x, R.shape([1, 49, 64]))

A chain is followed on the numbers 0, 1, 2 ...: where they arrive in order, it is a reshape of where it started.
Transpositions that do not cancel stay apart: kernels for products of two activations take the last one in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter

VIEWS = ("relax.reshape", "relax.squeeze", "relax.expand_dims", "relax.flatten", "relax.nn.batch_flatten")


@tvm.transform.module_pass(opt_level=0, name="SimplifyViews")
class SimplifyViews:
    """Rewrite ``main``; what is not read any more is left to dead code elimination."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


class _Rewriter(MainRewriter):
    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        if op_name(value) not in (*VIEWS, "relax.permute_dims") or static_shape(var) is None:
            self.keep(var, value)
            return
        source = self._origin(var)
        if source is None:
            self.keep(var, value)
        elif shape_of(source) == shape_of(var):
            self.variables[var] = self.expression(source)
        else:
            call = relax.op.reshape(self.expression(source), shape_of(var))
            self.variables[var] = self.builder.emit(call, var.name)

    def _origin(self, var: relax.Var) -> relax.Var | None:
        """The farthest tensor that ``var`` is a reshape of."""
        chain = [var]
        value = self.definition.get(var)
        while isinstance(value, relax.Call) and op_name(value) in (*VIEWS, "relax.permute_dims"):
            source = value.args[0]
            if not isinstance(source, relax.Var) or static_shape(source) is None:
                break
            chain.append(source)
            value = self.definition.get(source)
        for start in range(len(chain) - 1, 0, -1):
            if (np.diff(elements_of_chain(self.definition, chain[: start + 1]).reshape(-1)) == 1).all():
                return chain[start]
        return None


def elements_of_chain(definition: Mapping[relax.Var, Any], chain: Sequence[relax.Var]) -> np.ndarray:
    """Which element of ``chain[-1]`` each element of ``chain[0]`` is, where each views or transposes the next."""
    shape = shape_of(chain[-1])
    order = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    for step in chain[-2::-1]:
        call = definition[step]
        if op_name(call) == "relax.permute_dims":
            axes = call.attrs.axes
            order = order.transpose(None if axes is None else [int(axis) for axis in axes])
        else:
            order = order.reshape(shape_of(step))
    return order
