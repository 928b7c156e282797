"""What lies between a value and one it is computed from, as a function on numbers.

A file may write the same layer in many ways, so its operators are not matched one by one: they are evaluated, and the
result is compared with what the layer would give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace

import numpy as np
from tvm import relax, tirx
from tvm.ir import GenericConst

from tvm_qfp8.calibration.operators import TABLE
from tvm_qfp8.relay_passes.fuse import op_name
from tvm_qfp8.relay_passes.rewriter import MainRewriter

UNARY = (
    "relax.erf", "relax.exp", "relax.log", "relax.tanh", "relax.sigmoid", "relax.nn.relu", "relax.clip",
    "relax.negative", "relax.sqrt", "relax.rsqrt", "relax.square", "relax.abs", "relax.nn.softplus",
)  # fmt: skip
BINARY = (
    "relax.add", "relax.subtract", "relax.multiply", "relax.divide", "relax.power", "relax.maximum", "relax.minimum",
    "relax.where",
)  # fmt: skip
LONGEST_CHAIN = 24


class ConeRewriter(MainRewriter):
    """The cone of a variable and a source: all variables between them, of allowed operators alone."""

    def operands(
        self, value: relax.Expr, allowed: tuple[str, ...], arrays: bool = False
    ) -> list[relax.Var] | None:
        """The variables an allowed operator reads; None where it is not allowed, or reads a constant array unless
        ``arrays``."""
        if op_name(value) not in allowed:
            return None
        found = []
        for argument in value.args:
            if isinstance(argument, relax.Var) and self.constant(argument) is None:
                found.append(argument)
            elif isinstance(argument, relax.Var | GenericConst):
                constant = self.constant(argument)
                if constant is None or (constant.value.numpy().size != 1 and not arrays):
                    return None
        return found

    def sources(self, var: relax.Var, allowed: tuple[str, ...], arrays: bool = False) -> list[relax.Var]:
        """Values that ``var`` depends on through allowed operators alone, each without any other value; nearest
        first."""
        chains: dict[relax.Var, list[relax.Var]] = {}

        def chain(v: relax.Var, depth: int) -> list[relax.Var]:
            if v in chains:
                return chains[v]
            operands = None
            if depth < LONGEST_CHAIN:
                operands = self.operands(self.definition.get(v), allowed, arrays)
            result = [v]
            if operands:
                parts = [chain(o, depth + 1) for o in dict.fromkeys(operands)]
                common = [c for c in parts[0] if all(any(c.same_as(d) for d in p) for p in parts[1:])]
                result += common
            chains[v] = result
            return result

        return chain(var, 0)[1:]

    def cone(self, var: relax.Var, source: relax.Var) -> tuple[list[relax.Var], list[float]]:
        """Variables between ``source`` and ``var``, this one too, and the single constants they read."""
        seen: list[relax.Var] = []
        constants: list[float] = []
        pending = [var]
        while pending:
            v = pending.pop()
            if v.same_as(source) or any(v.same_as(s) for s in seen):
                continue
            seen.append(v)
            for argument in self.definition[v].args:
                constant = self.constant(argument) if isinstance(argument, relax.Var | GenericConst) else None
                if constant is None:
                    if isinstance(argument, relax.Var):
                        pending.append(argument)
                elif constant.value.numpy().size == 1:
                    constants.append(float(constant.value.numpy().reshape(())))
        return seen, constants

    def evaluate(
        self,
        var: relax.Var,
        source: relax.Var,
        value: np.ndarray,
        own: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
    ) -> np.ndarray:
        """``var`` as a function of ``source``, in float64; ``own`` stands for operators of these names."""
        known: dict[relax.Var, np.ndarray] = {source: value}

        def at(expr) -> np.ndarray | float:
            if isinstance(expr, tirx.FloatImm | tirx.IntImm):
                return float(expr.value)
            if isinstance(expr, relax.Var) and expr in known:
                return known[expr]
            constant = self.constant(expr)
            if constant is not None:
                array = constant.value.numpy().astype(np.float64)
                return array.reshape(()) if array.size == 1 else array
            call = self.definition[expr]
            name = op_name(call)
            if own and name in own:
                result = own[name](np.asarray(at(call.args[0])))
            else:
                attrs = SimpleNamespace(result=SimpleNamespace(dtype="float64"))
                result = np.asarray(TABLE[name](attrs, *(at(argument) for argument in call.args)), np.float64)
            known[expr] = result
            return result

        with np.errstate(all="ignore"):
            return np.asarray(at(var))
