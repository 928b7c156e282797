"""Comparisons, products and sums of booleans become logic.

TVM 0.27 generates no code for them: LLVM refuses the float instructions that it emits. Before::

    lv = R.equal(a, b)                            # a, b: bool

After::

    lv = R.logical_not(R.logical_xor(a, b))
"""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import relax

from tvm_qfp8.relay_passes.fuse import op_name
from tvm_qfp8.relay_passes.rewriter import MainRewriter

_Logic = Callable[[relax.Expr, relax.Expr], relax.Expr]
_not, _and, _or = relax.op.logical_not, relax.op.logical_and, relax.op.logical_or
LOGIC: dict[str, _Logic] = {
    "relax.equal": lambda a, b: _not(relax.op.logical_xor(a, b)),
    "relax.not_equal": relax.op.logical_xor,
    "relax.less": lambda a, b: _and(_not(a), b),
    "relax.less_equal": lambda a, b: _or(_not(a), b),
    "relax.greater": lambda a, b: _and(a, _not(b)),
    "relax.greater_equal": lambda a, b: _or(a, _not(b)),
    "relax.maximum": _or,
    "relax.minimum": _and,
    "relax.multiply": _and,
    "relax.add": _or,
}


@tvm.transform.module_pass(opt_level=0, name="CompareBooleans")
class CompareBooleans:
    """Rewrite ``main``."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return _Rewriter(mod).rewrite()


class _Rewriter(MainRewriter):
    def replacement(self, _var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        logic = LOGIC.get(op_name(value))
        if logic is None or str(value.args[0].ty.dtype) != "bool":
            return None
        return logic(*map(self.expression, value.args))
