"""For GPUs: products of two activations read heads where they lie, between tokens and values.

Before (codes ``(batch, tokens, heads, values)``)::

    lv = R.permute_dims(queries, axes=[0, 2, 1, 3])
    lv1 = R.permute_dims(keys, axes=[0, 2, 1, 3])
    scores = R.qfp8.batch_matmul(lv, lv1, transpose_y=True)

After::

    scores = R.qfp8.batch_matmul(queries, keys, transpose_y=True, x_heads_inside=True, y_heads_inside=True)
"""

from __future__ import annotations

import tvm
from tvm import relax

from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.fuse import op_name
from tvm_qfp8.relay_passes.rewriter import MainRewriter

SWAPPED = [0, 2, 1, 3]


@tvm.transform.module_pass(opt_level=0, name="FoldHeads")
class FoldHeads:
    """Let products read what a swap of tokens and heads reads; the swap is dead then, unless others read it."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return _Rewriter(mod).rewrite()


class _Rewriter(MainRewriter):
    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        if op_name(value) != "relax.qfp8.batch_matmul":
            self.keep(var, value)
            return
        sources = [self._before_swap(argument) for argument in value.args]
        x, y = (
            self.expression(argument if source is None else source)
            for argument, source in zip(value.args, sources, strict=True)
        )
        call = qfp8_ops.batch_matmul(
            x,
            y,
            float(value.attrs["scale"]),
            transpose_y=bool(value.attrs["transpose_y"]),
            heads_inside=(sources[0] is not None, sources[1] is not None),
        )
        self.variables[var] = self.builder.emit(call, var.name)

    def _before_swap(self, argument: relax.Expr) -> relax.Expr | None:
        if not isinstance(argument, relax.Var) or argument not in self.definition:
            return None
        swap = self.definition[argument]
        if op_name(swap) != "relax.permute_dims" or swap.attrs.axes is None:
            return None
        return swap.args[0] if [int(axis) for axis in swap.attrs.axes] == SWAPPED else None
