"""Turns the kernels that TVM's ONNX importer writes for ``Clip`` back into operators.

Runs after the bounds, which arrive as ``where(isnan(bound), inf, bound)``, are folded. Before::

    lv = R.call_tir(maximum, (x, R.const(0.0)), out_ty=...)

After::

    lv = R.maximum(x, R.const(0.0))

Opset 10 and older hold the bound inside the kernel. Recognised is a kernel with a single store, of the larger or
smaller of an element of its first buffer, at the index of the store, and of a number or a 0-D buffer.
"""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.ir import Expr, TensorLoad

from tvm_qfp8.relay_passes.fuse import op_name, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter

OPERATORS = {tirx.Max: relax.op.maximum, tirx.Min: relax.op.minimum}


@tvm.transform.module_pass(opt_level=0, name="LiftClip")
class LiftClip:
    """Rewrite ``main``; kernels that are not called any more are left to dead code elimination."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return _Rewriter(mod).rewrite()


class _Rewriter(MainRewriter):
    def replacement(self, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        return self._lift(var, value) if op_name(value) == "relax.call_tir" else None

    def _lift(self, var: relax.Var, value: relax.Call) -> relax.Expr | None:
        function = self.mod[value.args[0]]
        arguments = list(value.args[1].fields)
        found = _single_extremum(function)
        if found is None or static_shape(arguments[0]) != static_shape(var):
            return None
        kind, bound = found
        if bound is not None and len(arguments) == 1:
            second = relax.const(bound, str(var.ty.dtype))
        elif bound is None and len(arguments) == 2:
            second = self.expression(arguments[1])
        else:
            return None
        return OPERATORS[kind](self.expression(arguments[0]), second)


def _single_extremum(function: tirx.PrimFunc) -> tuple[type, float | None] | None:
    """(Max or Min, its bound or None for a 0-D buffer) if that is all the kernel computes."""
    stores: list[tirx.BufferStore] = []
    tvm_ffi.structural_walk(function.body, (tirx.BufferStore, stores.append))
    if len(stores) != 1 or type(stores[0].value) not in OPERATORS:
        return None
    store = stores[0]
    first, second = store.value.a, store.value.b
    if not (_reads(first, function.params[0]) and store.buffer.same_as(function.params[-1])):
        return None
    if len(first.indices) != len(store.indices):
        return None
    if not all(a.same_as(b) for a, b in zip(first.indices, store.indices, strict=True)):
        return None
    if isinstance(second, tirx.FloatImm | tirx.IntImm):
        return type(store.value), float(second.value)
    if _reads(second, function.params[1]) and not len(second.indices):
        return type(store.value), None
    return None


def _reads(expr: Expr, buffer: Expr) -> bool:
    return isinstance(expr, TensorLoad) and expr.source.same_as(buffer)
