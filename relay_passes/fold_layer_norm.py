"""Takes the scale and shift after a LayerNorm into it.

Runs after ``RecognizeNorms``, which finds the normalisation alone. Before::

    lv = R.nn.layer_norm(x, ones, zeros, axes=[-1])
    lv1 = R.multiply(lv, gamma)
    lv2 = R.add(lv1, beta)

After::

    lv2 = R.nn.layer_norm(x, gamma, beta, axes=[-1])

Over another axis likewise, with ``gamma`` and ``beta`` along it.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter


@tvm.transform.module_pass(opt_level=0, name="FoldLayerNorm")
class FoldLayerNorm:
    """Rewrite ``main``; LayerNorms of which nothing is read any more are left to dead code elimination."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


class _Rewriter(MainRewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        # From variables to (LayerNorm, its scale, its shift) that they are.
        self.norms: dict[relax.Var, tuple[relax.Call, np.ndarray, np.ndarray]] = {}

    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        if op_name(value) == "relax.nn.layer_norm":
            scale, shift = (self.constant(argument) for argument in value.args[1:])
            if scale is not None and shift is not None and len(value.attrs.axes) == 1:
                self.norms[var] = (value, scale.value.numpy(), shift.value.numpy())
        elif op_name(value) in ("relax.multiply", "relax.add"):
            self._affine(var, value)
        if op_name(value) == "relax.nn.layer_norm" or var not in self.norms:
            self.keep(var, value)
            return
        norm, scale, shift = self.norms[var]
        constants = [relax.const(np.ascontiguousarray(c, np.float32)) for c in (scale, shift)]
        call = relax.Call(norm.op, [self.expression(norm.args[0]), *constants], norm.attrs, norm.ty_args)
        self.variables[var] = self.builder.emit(call, var.name)

    def _affine(self, var: relax.Var, value: relax.Call) -> None:
        for x, other in (value.args, reversed(value.args)):
            constant = self.constant(other)
            if constant is None or x not in self.norms or self.uses[x] != 1:
                continue
            norm, scale, shift = self.norms[x]
            array, rank = constant.value.numpy(), len(shape_of(var))
            if static_shape(x) != static_shape(var) or not (
                array.size == 1 or _is_row(array, rank, int(norm.attrs.axes[0]) % rank, len(scale))
            ):
                continue
            number = array.reshape(-1)
            product = op_name(value) == "relax.multiply"
            self.norms[var] = (
                (norm, scale * number, shift * number) if product else (norm, scale, shift + number)
            )
            return


def _is_row(array: np.ndarray, rank: int, axis: int, length: int) -> bool:
    """Whether a constant has a number for each place along the axis, and is the same along all others."""
    extents = (1,) * (rank - array.ndim) + array.shape
    return array.size == length == extents[axis]
