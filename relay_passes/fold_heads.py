"""Products of two activations read heads where they lie, between tokens and values, and write them there.

Before (codes ``(batch, tokens, heads, values)``)::

    lv = R.permute_dims(queries, axes=[0, 2, 1, 3])
    lv1 = R.permute_dims(keys, axes=[0, 2, 1, 3])
    scores = R.qfp8.batch_matmul(lv, lv1, transpose_y=True)
    ...
    mixed = R.qfp8.batch_matmul(shares, lv2)
    together = R.permute_dims(R.qfp8.encode(mixed), axes=[0, 2, 1, 3])

After::

    scores = R.qfp8.batch_matmul(queries, keys, transpose_y=True, x_heads_inside=True, y_heads_inside=True)
    ...
    together = R.qfp8.encode(R.qfp8.batch_matmul(shares, values, y_heads_inside=True, result_heads_inside=True))
"""

from __future__ import annotations

import tvm
from tvm import relax

from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.fuse import op_name, shape_of
from tvm_qfp8.relay_passes.rewriter import MainRewriter

SWAPPED = [0, 2, 1, 3]


@tvm.transform.module_pass(opt_level=0, name="FoldHeads")
class FoldHeads:
    """Let products take over swaps of tokens and heads; one before them is dead then, unless others read it."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return _Rewriter(relax.transform.DeadCodeElimination()(mod)).rewrite()


def _before_swap(value: relax.Expr | None) -> relax.Expr | None:
    """What a swap of tokens and heads reads; None for all else."""
    if (
        not isinstance(value, relax.Call)
        or op_name(value) != "relax.permute_dims"
        or value.attrs.axes is None
    ):
        return None
    return value.args[0] if [int(axis) for axis in value.attrs.axes] == SWAPPED else None


class _Rewriter(MainRewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.swapped: set[relax.Var] = set()
        """Results of products, and codes of these, that are in the swapped order already."""

    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        if op_name(value) == "relax.qfp8.batch_matmul":
            self.product(var, value)
        elif op_name(value) == "relax.qfp8.encode" and value.args[0] in self.swapped:
            self.swapped.add(var)
            self.keep(var, value)
        elif _before_swap(value) in self.swapped:
            self.variables[var] = self.expression(value.args[0])
        else:
            self.keep(var, value)

    def product(self, var: relax.Var, value: relax.Call) -> None:
        operands, scales = value.args[:2], qfp8_ops.product_scales(value)
        sources = [_before_swap(self.definition.get(argument)) for argument in operands]
        if scales[0] is not None and len(shape_of(scales[0])) > 1:
            sources[0] = None  # rows stay in the order of their scales
        x, y = (
            self.expression(argument if source is None else source)
            for argument, source in zip(operands, sources, strict=True)
        )
        result = self._is_only_swapped(var)
        call = qfp8_ops.batch_matmul(
            x,
            y,
            float(value.attrs["scale"]),
            transpose_y=bool(value.attrs["transpose_y"]),
            heads_inside=(sources[0] is not None, sources[1] is not None, result),
            x_scales=None if scales[0] is None else self.expression(scales[0]),
            y_scales=None if scales[1] is None else self.expression(scales[1]),
        )
        if result:
            self.swapped.add(var)
        self.variables[var] = self.builder.emit(call, var.name)

    def _is_only_swapped(self, var: relax.Var) -> bool:
        """Nothing but a swap reads it, or its codes with one scale."""
        if self.uses.get(var, 0) != 1 or len(self.readers[var]) != 1:
            return False
        (reader,) = self.readers[var]
        value = self.definition[reader]
        if op_name(value) == "relax.qfp8.encode" and len(value.args) == 1:
            return self._is_only_swapped(reader)
        return _before_swap(value) is not None
