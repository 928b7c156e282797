"""Recognises nonlinear layers that a file holds as many small operators.

Runs right after import. Before (as torch's exporter writes GELU)::

    lv1 = R.divide(lv, 1.41421354)
    lv2 = R.erf(lv1)
    lv3 = R.add(lv2, 1.0)
    lv4 = R.multiply(lv, lv3)
    lv5 = R.multiply(lv4, 0.5)

After::

    lv5 = R.nn.gelu(lv)

A file may write the same function in many ways, so the operators are not matched one by one: whatever lies between
a value and one it is computed from, scalar constants aside, is evaluated on numbers and compared with the known
functions. LayerNorm and RMSNorm are recognised likewise, with means over the last axes among the operators; with
them InstanceNorm, which is the same over height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.ir import GenericConst

from tvm_qfp8.calibration.operators import TABLE
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter
from tvm_qfp8.tables.families import find_function

UNARY = (
    "relax.erf", "relax.exp", "relax.log", "relax.tanh", "relax.sigmoid", "relax.nn.relu", "relax.clip",
    "relax.negative", "relax.sqrt", "relax.rsqrt", "relax.square", "relax.abs", "relax.nn.softplus",
)  # fmt: skip
BINARY = (
    "relax.add", "relax.subtract", "relax.multiply", "relax.divide", "relax.power", "relax.maximum", "relax.minimum",
    "relax.where",
)  # fmt: skip
COMPARISONS = ("relax.greater", "relax.greater_equal", "relax.less", "relax.less_equal")
MEANS = ("relax.mean", "relax.variance")
LONGEST_CHAIN = 24
GRID = np.concatenate([np.linspace(-9, 9, 181), [-0.01, 0.01, 3.3, -3.3]]).astype(np.float64)


def _erf(x: np.ndarray) -> np.ndarray:
    return TABLE["relax.erf"](SimpleNamespace(), x)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


FUNCTIONS: dict[str, tuple[Callable, Callable]] = {
    "gelu": (relax.op.nn.gelu, lambda x: 0.5 * x * (1 + _erf(x / np.sqrt(2)))),
    "gelu_tanh": (
        relax.op.nn.gelu_tanh,
        lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    ),
    "silu": (relax.op.nn.silu, lambda x: x * _sigmoid(x)),
    "sigmoid": (relax.op.sigmoid, _sigmoid),
    "tanh": (relax.op.tanh, np.tanh),
    "softplus": (relax.op.nn.softplus, lambda x: np.log1p(np.exp(x))),
    "mish": (partial(qfp8_ops.activation, "mish"), find_function("mish").reference),
    "selu": (partial(qfp8_ops.activation, "selu"), find_function("selu").reference),
}
TOLERANCE = 2e-6


def _activation(name: str, alpha: float, x: relax.Expr) -> relax.Call:
    return qfp8_ops.activation(name, x, alpha)


@tvm.transform.module_pass(opt_level=0, name="Recognize")
class Recognize:
    """Put GELU, SiLU, softplus, LayerNorm and RMSNorm back together.

    What they were made of is left to dead code elimination.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


class _Rewriter(MainRewriter):
    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        found = None
        if op_name(value) in BINARY and str(getattr(var.ty, "dtype", "")) == "float32":
            if op_name(value) in ("relax.divide", "relax.multiply"):
                found = self._layer_norm(var)
            if found is None:
                found = self._function(var)
        if found is None:
            self.keep(var, value)
        else:
            self.variables[var] = self.builder.emit(found, var.name)

    # -- scalar functions -------------------------------------------------------------------------------------

    def _operands(self, value: relax.Expr, allowed: tuple[str, ...]) -> list[relax.Var] | None:
        """The variables an allowed operator reads; None where it is not allowed or reads an array constant."""
        if op_name(value) not in allowed:
            return None
        found = []
        for argument in value.args:
            if isinstance(argument, relax.Var) and self.constant(argument) is None:
                found.append(argument)
            elif isinstance(argument, relax.Var | GenericConst):
                constant = self.constant(argument)
                if constant is None or constant.value.numpy().size != 1:
                    return None
        return found

    def _sources(self, var: relax.Var, allowed: tuple[str, ...]) -> list[relax.Var]:
        """Values that ``var`` depends on through allowed operators alone, each without any other value; nearest
        first."""
        chains: dict[relax.Var, list[relax.Var]] = {}

        def chain(v: relax.Var, depth: int) -> list[relax.Var]:
            if v in chains:
                return chains[v]
            operands = self._operands(self.definition.get(v), allowed) if depth < LONGEST_CHAIN else None
            result = [v]
            if operands:
                parts = [chain(o, depth + 1) for o in dict.fromkeys(operands)]
                common = [c for c in parts[0] if all(any(c.same_as(d) for d in p) for p in parts[1:])]
                result += common
            chains[v] = result
            return result

        return chain(var, 0)[1:]

    def _evaluate(self, var: relax.Var, source: relax.Var, value: np.ndarray) -> np.ndarray:
        """``var`` as a function of ``source``, in float64."""
        known: dict[relax.Var, np.ndarray] = {source: value}

        def at(expr) -> np.ndarray | float:
            if isinstance(expr, tirx.FloatImm | tirx.IntImm):
                return float(expr.value)
            if isinstance(expr, relax.Var) and expr in known:
                return known[expr]
            constant = self.constant(expr)
            if constant is not None:
                return constant.value.numpy().astype(np.float64).reshape(())
            call = self.definition[expr]
            arguments = [at(argument) for argument in call.args]
            attrs = SimpleNamespace(axis=(-1,), keepdims=True, result=SimpleNamespace(dtype="float64"))
            result = np.asarray(TABLE[op_name(call)](attrs, *arguments), np.float64)
            known[expr] = result
            return result

        with np.errstate(all="ignore"):
            return np.asarray(at(var))

    def _function(self, var: relax.Var) -> relax.Call | None:
        allowed = UNARY + BINARY + COMPARISONS
        for source in self._sources(var, allowed):
            if static_shape(source) != static_shape(var) or str(source.ty.dtype) != "float32":
                continue
            got = self._evaluate(var, source, GRID)
            for make, function in [*FUNCTIONS.values(), *self._with_parameter(var, source)]:
                expected = function(GRID)
                if got.shape == expected.shape and np.allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE):
                    return make(self.expression(source))
        return None

    def _with_parameter(self, var: relax.Var, source: relax.Var) -> list[tuple[Callable, Callable]]:
        """ELU and CELU, their alpha being any of the constants."""
        found: list[tuple[Callable, Callable]] = []
        for alpha in sorted({abs(constant) for constant in self._cone(var, source)[1]}):
            if 1e-3 <= alpha <= 1e3:
                for name in ("elu", "celu"):
                    make = partial(_activation, name, alpha)
                    found.append((make, find_function(f"{name}({alpha!r})").reference))
        return found

    # -- LayerNorm --------------------------------------------------------------------------------------------

    def _layer_norm(self, var: relax.Var) -> relax.Call | None:
        """LayerNorm or RMSNorm alone; scale and shift are taken in by ``FoldLayerNorm``."""
        found = self._normalised(var)
        if found is None:
            return None
        source, epsilon, count, centred = found
        axes, shape = list(range(-count, 0)), shape_of(var)[-count:]
        ones, zeros = (relax.const(np.full(shape, number, np.float32)) for number in (1.0, 0.0))
        if centred:
            return relax.op.nn.layer_norm(self.expression(source), ones, zeros, axes=axes, epsilon=epsilon)
        return relax.op.nn.rms_norm(self.expression(source), ones, axes=axes, epsilon=epsilon)

    def _row_axes(self, value: relax.Call) -> int | None:
        """How many last axes a mean or variance is over, all of which it keeps."""
        axes = value.attrs.axis
        if not value.attrs.keepdims or axes is None:
            return None
        rank = len(value.args[0].ty.shape)
        found = sorted(int(axis) % rank for axis in axes)
        return len(found) if found == list(range(rank - len(found), rank)) else None

    def _normalised(self, var: relax.Var) -> tuple[relax.Var, float, int, bool] | None:
        """(source, epsilon, number of last axes, whether the mean is taken off)."""
        allowed = (*UNARY, *BINARY, *MEANS)
        rng = np.random.default_rng(0)
        rms: tuple[relax.Var, float, int, bool] | None = None
        for source in self._sources(var, allowed):
            if static_shape(source) != static_shape(var) or not static_shape(source):
                continue
            row = rng.standard_normal((3, shape_of(source)[-1])) * 2 + 0.5
            cone, constants = self._cone(var, source)
            means = [v for v in cone if op_name(self.definition[v]) in MEANS]
            counts = {self._row_axes(self.definition[v]) for v in means}
            count = counts.pop() if len(counts) == 1 else None
            if count is None:
                continue
            got = self._evaluate(var, source, row)
            centred = row - row.mean(-1, keepdims=True)
            for epsilon in (c for c in constants if 0 < c < 1e-1):
                for values in (centred, row):
                    expected = values / np.sqrt((values**2).mean(-1, keepdims=True) + epsilon)
                    if got.shape == expected.shape and np.allclose(got, expected, rtol=1e-6, atol=1e-9):
                        if values is centred:
                            return source, epsilon, count, True
                        # A source further away may hold the mean too: then it is LayerNorm.
                        rms = rms or (source, epsilon, count, False)
        return rms

    def _cone(self, var: relax.Var, source: relax.Var) -> tuple[list[relax.Var], list[float]]:
        """Variables between ``source`` and ``var`` and the scalar constants they read."""
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
                if constant is not None:
                    constants.append(float(constant.value.numpy().reshape(-1)[0]))
                elif isinstance(argument, relax.Var):
                    pending.append(argument)
        return seen, constants
