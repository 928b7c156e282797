"""Products of batches that repeat one operand get operands of as many batches, which kernels multiply.

Queries of all heads that meet one key, as in multi-query attention (Shazeer, "Fast Transformer Decoding", 2019), are
rows of one product. Before::

    lv = R.matmul(q, k)                           # q (1, 4, 196, 64), k (1, 1, 64, 49)

After, without moving anything::

    lv1 = R.reshape(q, R.shape([1, 784, 64]))
    lv2 = R.matmul(lv1, R.reshape(k, R.shape([1, 64, 49])))
    lv = R.reshape(lv2, R.shape([1, 4, 196, 49]))

Where it is the left operand that is repeated, or a batch before others, copies of it are made.
"""

from __future__ import annotations

import math

import tvm
from tvm import relax

from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter


@tvm.transform.module_pass(opt_level=0, name="BroadcastProducts")
class BroadcastProducts:
    """Rewrite ``main``."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return _Rewriter(mod).rewrite()


class _Rewriter(MainRewriter):
    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        if not self._repeats(value):
            self.keep(var, value)
            return
        x, y = map(self.expression, value.args)
        whole = shape_of(value)[:-2]
        (rows, depth), columns = shape_of(x)[-2:], shape_of(y)[-1]
        of_x, of_y = ((1,) * (len(whole) - len(shape_of(z)) + 2) + shape_of(z)[:-2] for z in (x, y))
        kept = len(whole)
        while kept and of_y[kept - 1] == 1:  # what y repeats at the end are more rows
            kept -= 1
        rows *= math.prod(of_x[kept:])
        batch = whole[:kept]
        x = self._repeated(x, of_x[:kept], (*batch, rows, depth))
        y = self._repeated(y, of_y[:kept], (*batch, depth, columns))
        product = self.builder.emit(relax.op.matmul(x, y), var.name)
        shape = shape_of(value)
        same = shape_of(product) == shape
        self.variables[var] = (
            product if same else self.builder.emit(relax.op.reshape(product, shape), var.name)
        )

    def _repeats(self, value: relax.Expr) -> bool:
        """A product of batches, not all of which both operands have; a dense layer has its weight for all rows."""
        if (
            op_name(value) != "relax.matmul"
            or static_shape(value) is None
            or str(value.ty.dtype) != "float32"
        ):
            return False
        x, y = map(static_shape, value.args)
        if x is None or y is None or min(len(x), len(y)) < 2 or x[:-2] == y[:-2] or 0 in shape_of(value):
            return False
        return len(y) > 2 or self.constant(value.args[1]) is None

    def _repeated(self, x: relax.Expr, batch: tuple[int, ...], shape: tuple[int, ...]) -> relax.Expr:
        """A matrix for each of all batches, of those that ``x`` has."""
        own = (*batch, *shape[-2:])
        if shape_of(x) != own:
            x = self.builder.emit(relax.op.reshape(x, own))
        return x if own == shape else self.builder.emit(relax.op.broadcast_to(x, shape))
