"""Constants of equal bytes become one.

Packing gives every layer arrays of its own, also where layers share weights.
Before::

    lv = R.call_tir(cls.matmul, (x, metadata["ir.GenericConst"][0]))
    lv1 = R.call_tir(cls.matmul, (y, metadata["ir.GenericConst"][1]))

After::

    lv1 = R.call_tir(cls.matmul, (y, metadata["ir.GenericConst"][0]))
"""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.calibration.contents import Contents, contents
from tvm_qfp8.relay_passes.rewriter import MainRewriter


@tvm.transform.module_pass(opt_level=0, name="ShareConstants")
class ShareConstants:
    """Rewrite ``main``."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return _Rewriter(mod).rewrite()


class _Rewriter(MainRewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.first: dict[Contents, GenericConst] = {}

    def expression(self, expr: relax.Expr) -> relax.Expr:
        if not isinstance(expr, GenericConst):
            return super().expression(expr)
        return self.first.setdefault(contents(expr.value.numpy()), expr)
