"""Takes broadcasts off what a matmul multiplies: it broadcasts itself.

Runs before constants are folded, for which a weight would be held many times. Before::

    lv = R.broadcast_to(weight, R.shape([10, 64, 192]))   # weight (64, 192)
    lv1 = R.matmul(x, lv)                                 # x (10, 2, 64)

After::

    lv1 = R.matmul(x, weight)

So ``torch.export`` writes dense layers of transposed batches, as in ``torch.nn.MultiheadAttention``.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter


@tvm.transform.module_pass(opt_level=0, name="MatmulBroadcasts")
class MatmulBroadcasts:
    """Rewrite ``main``; broadcasts that nothing reads any more are left to dead code elimination."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


class _Rewriter(MainRewriter):
    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        if op_name(value) != "relax.matmul" or any(static_shape(x) is None for x in (value, *value.args)):
            self.keep(var, value)
            return
        operands = list(value.args)
        for place in range(2):
            narrow = self._before_broadcast(operands[place])
            others = shape_of(operands[1 - place])
            if narrow is not None and _batch(shape_of(narrow), others) == shape_of(value)[:-2]:
                operands[place] = narrow
        call = relax.Call(value.op, [self.expression(x) for x in operands], value.attrs, value.ty_args)
        self.variables[var] = self.builder.emit(call, var.name)

    def _before_broadcast(self, expr: relax.Expr) -> relax.Expr | None:
        """The matrices that ``expr`` repeats, if it does nothing else."""
        value = self.bound(expr)
        if op_name(value) != "relax.broadcast_to" or static_shape(value.args[0]) is None:
            return None
        shape = shape_of(value.args[0])
        return value.args[0] if len(shape) >= 2 and shape[-2:] == shape_of(expr)[-2:] else None


def _batch(x: tuple[int, ...], y: tuple[int, ...]) -> tuple[int, ...]:
    """Extents before the matrices of a product; none fits where either is a vector."""
    return np.broadcast_shapes(x[:-2], y[:-2]) if min(len(x), len(y)) >= 2 else (-1,)
