"""Brings back the clip that the ONNX importer takes apart.

Before (bounds folded)::

    lv = R.call_tir(cls.maximum, (x, R.const(0.0)), ...)
    lv1 = R.call_tir(cls.minimum, (lv, R.const(6.0)), ...)

After::

    lv1 = R.clip(x, 0.0, 6.0)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from tvm_qfp8.relay_passes.fuse import op_name
from tvm_qfp8.relay_passes.rewriter import MainRewriter


@tvm.transform.module_pass(opt_level=0, name="RestoreClip")
class RestoreClip:
    """Rewrite maximum and minimum with a scalar constant."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        rewritten = _Rewriter(mod).rewrite()
        return relax.transform.DeadCodeElimination()(rewritten)


class _Rewriter(MainRewriter):
    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        bound = self._bound(value)
        if bound is None:
            self.keep(var, value)
            return
        kind, x, limit = bound
        low, high = (limit, float("inf")) if kind == "maximum" else (float("-inf"), limit)
        inner = self._bound(self.definition.get(x)) if isinstance(x, relax.Var) else None
        if kind == "minimum" and inner is not None and inner[0] == "maximum" and inner[2] <= limit:
            x, low = inner[1], inner[2]
        float32 = [tirx.FloatImm("float32", float(np.float32(b))) for b in (low, high)]
        self.variables[var] = self.builder.emit(relax.op.clip(self.expression(x), *float32), var.name)

    def _bound(self, value: Any) -> tuple[str, relax.Expr, float] | None:
        """(maximum or minimum, tensor, scalar constant) of a call, or None."""
        kind, arguments = op_name(value).removeprefix("relax."), []
        if kind == "call_tir":
            kind = value.args[0].name_hint.rstrip("0123456789_")
            arguments = list(value.args[1].fields) if isinstance(value.args[1], relax.Tuple) else []
        elif kind in ("maximum", "minimum"):
            arguments = list(value.args)
        if kind not in ("maximum", "minimum") or len(arguments) != 2:
            return None
        for x, other in (arguments, reversed(arguments)):
            constant = self.constant(other)
            if constant is None or self.constant(x) is not None or str(getattr(x.ty, "dtype", "")) != "float32":
                continue
            if constant.value.numpy().size == 1:
                return kind, x, float(constant.value.numpy().reshape(-1)[0])
        return None
