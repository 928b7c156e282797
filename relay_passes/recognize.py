"""Recognises scalar functions that a file holds as many small operators.

Runs right after import. Before (as torch's exporter writes GELU)::

    lv1 = R.divide(lv, 1.41421354)
    lv2 = R.erf(lv1)
    lv3 = R.add(lv2, 1.0)
    lv4 = R.multiply(lv, lv3)
    lv5 = R.multiply(lv4, 0.5)

After::

    lv5 = R.nn.gelu(lv)

What lies between a value and one it is computed from, single constants aside, is evaluated on numbers and compared
with the known functions (``cones.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import tvm
from tvm import relax

from tvm_qfp8.calibration.operators import TABLE
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.cones import BINARY, UNARY, ConeRewriter
from tvm_qfp8.relay_passes.fuse import op_name, static_shape
from tvm_qfp8.tables.families import find_function

COMPARISONS = ("relax.greater", "relax.greater_equal", "relax.less", "relax.less_equal")
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
    """Put GELU, SiLU, softplus and their like back together.

    What they were made of is left to dead code elimination.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


class _Rewriter(ConeRewriter):
    def replacement(self, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        is_float = str(getattr(var.ty, "dtype", "")) == "float32"
        return self._function(var) if op_name(value) in BINARY and is_float else None

    def _function(self, var: relax.Var) -> relax.Call | None:
        allowed = UNARY + BINARY + COMPARISONS
        for source in self.sources(var, allowed):
            if static_shape(source) != static_shape(var) or str(source.ty.dtype) != "float32":
                continue
            got = self.evaluate(var, source, GRID)
            for make, function in [*FUNCTIONS.values(), *self._with_parameter(var, source)]:
                expected = function(GRID)
                if got.shape == expected.shape and np.allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE):
                    return make(self.expression(source))
        return None

    def _with_parameter(self, var: relax.Var, source: relax.Var) -> list[tuple[Callable, Callable]]:
        """ELU and CELU, their alpha being any of the constants."""
        found: list[tuple[Callable, Callable]] = []
        for alpha in sorted({abs(constant) for constant in self.cone(var, source)[1]}):
            if 1e-3 <= alpha <= 1e3:
                for name in ("elu", "celu"):
                    make = partial(_activation, name, alpha)
                    found.append((make, find_function(f"{name}({alpha!r})").reference))
        return found
