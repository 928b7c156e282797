"""Products with one-hot rows become lookups in a table.

Runs after ``Canonicalize``. Before (as JAX writes an embedding)::

    lv = R.equal(R.reshape(x, (1, 64, 1)), R.const([[[0, 1, ..., 256]]]))
    lv1 = R.matmul(R.astype(lv, "float32"), w)               # w (257, 32)

After::

    lv = R.where(R.less(x, 0), 257, R.minimum(x, 257))
    lv1 = R.take(concat(w, zeros), lv, axis=0)

Numbers outside give rows of zeros, as they did.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter


@tvm.transform.module_pass(opt_level=0, name="OneHotLookups")
class OneHotLookups:
    """Rewrite ``main``; the one-hot rows are left to dead code elimination."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


class _Rewriter(MainRewriter):
    def replacement(self, _var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        table = self.constant(value.args[1]) if op_name(value) == "relax.matmul" else None
        if table is None or str(value.ty.dtype) != "float32" or len(shape_of(table)) != 2:
            return None
        rows, columns = shape_of(table)
        indices = self._indices(value.args[0], rows)
        if indices is None:
            return None
        emit, dtype = self.builder.emit, str(indices.ty.dtype)
        zero, outside = (relax.const(number, dtype) for number in (0, rows))
        bounded = emit(relax.op.minimum(indices, outside))
        places = emit(relax.op.where(emit(relax.op.less(indices, zero)), outside, bounded))
        padded = np.vstack([table.value.numpy(), np.zeros((1, columns), np.float32)])
        return relax.op.take(relax.const(padded), places, axis=0, mode="wrap")

    def _indices(self, x: relax.Expr, depth: int) -> relax.Expr | None:
        """Of the new program: which of ``depth`` places of each row is 1; None where rows are not one-hot."""
        call = self.bound(x)
        if op_name(call) == "relax.reshape" and shape_of(call)[-1] == shape_of(call.args[0])[-1] == depth:
            # As the simplifier puts before a dense layer.
            indices = self._indices(call.args[0], depth)
            return None if indices is None else self.builder.emit(relax.op.reshape(indices, shape_of(x)[:-1]))
        if op_name(call) == "relax.astype":
            call = self.bound(call.args[0])
        if op_name(call) == "relax.one_hot":
            return self._of_operator(call, depth)
        if op_name(call) != "relax.equal":
            return None
        for numbers, places in (call.args, reversed(call.args)):
            constant, shape = self.constant(places), static_shape(numbers) or ()
            # Indices up to the table's length, which is one more, have to fit their type.
            if constant is None or shape[-1:] != (1,) or str(numbers.ty.dtype) not in ("int32", "int64"):
                continue
            array = constant.value.numpy()
            if (
                array.shape[-1:] == (depth,) == (array.size,)
                and (array.reshape(-1) == np.arange(depth)).all()
            ):
                return self.builder.emit(relax.op.reshape(self.expression(numbers), shape[:-1]))
        return None

    def _of_operator(self, call: relax.Call, depth: int) -> relax.Expr | None:
        indices, on, off = call.args
        rank = len(static_shape(call) or ())
        last = int(call.attrs.axis) % rank == rank - 1 if rank else False
        usual = (float(on.value), float(off.value)) == (1.0, 0.0) and int(call.attrs.depth) == depth
        wide = str(indices.ty.dtype) in ("int32", "int64")
        return self.expression(indices) if last and usual and wide else None
