"""The functions known by name: their float64 reference, range reduction and the facts that the proof needs.

``core`` is what the polynomials stand for, a function of the reduced argument: for ``even`` reductions the
residual ``f(|x|) - |x|``, for ``hinge`` and ``direct`` ones f itself, for ``odd`` f on ``x >= 0``. ``curvature``
bounds ``|core''|`` on the whole range; a test checks each against second differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_erf = np.frompyfunc(math.erf, 1, 1)
_erfc = np.frompyfunc(math.erfc, 1, 1)


def erf(x: np.ndarray) -> np.ndarray:
    """The error function, float64."""
    return np.asarray(_erf(np.asarray(x, np.float64)), np.float64)


def erfc(x: np.ndarray) -> np.ndarray:
    """1 - erf(x) without cancellation, float64."""
    return np.asarray(_erfc(np.asarray(x, np.float64)), np.float64)


@dataclass(frozen=True)
class Function:
    """A scalar function and how it is reduced to polynomials on a finite interval."""

    name: str
    reduction: str
    reference: Callable[[np.ndarray], np.ndarray]
    """float64 to float64, any argument, limits at the infinities."""
    core: Callable[[np.ndarray], np.ndarray] | None = None
    curvature: float = 0.0
    low: float | None = 0.0
    """Lower end of the reduced argument; None where the core tends to ``low_limit`` and is cut."""
    high: float | None = None
    low_limit: float = 0.0
    high_limit: float | None = 0.0
    """Limit of the core at the upper end; None where f(x) - x tends to 0 (reduction hinge)."""
    pins: tuple[float, ...] = (0.0,)
    """Reduced arguments at which the table is exact."""
    relative: bool = False
    slope: float = 1.0
    """Of f where x is large (reduction hinge)."""
    stretch: float = 1.0
    """The argument's unit: how wide the bend is."""
    exponent: float = 0.0
    """Of a power."""


def _residual_gelu(a):
    return -0.5 * a * erfc(a / math.sqrt(2.0))


def _residual_gelu_tanh(a):
    # x * (1 + tanh z) / 2 - x = -x / (1 + exp(2 z))
    z = math.sqrt(2.0 / math.pi) * (a + 0.044715 * a**3)
    return -a / (1.0 + np.exp(np.minimum(2.0 * z, 700.0)))


def _residual_silu(a):
    return -a / (1.0 + np.exp(np.minimum(a, 700.0)))


def _residual_softplus(a):
    return np.log1p(np.exp(-np.minimum(a, 700.0)))


def _mish(x):
    cut = np.clip(x, -700.0, 40.0)
    value = cut * np.tanh(np.log1p(np.exp(cut)))
    return np.where(x > 40.0, x, np.where(x < -700.0, 0.0, value))


def _with_residual(core):
    return lambda x: np.maximum(x, 0.0) + core(np.minimum(np.abs(x), 1e4))


def _hardsigmoid(x):
    return np.clip(x / 6.0 + 0.5, 0.0, 1.0)


def _hardswish(x):
    return np.where(x < -3.0, 0.0, np.maximum(x, -3.0) * _hardsigmoid(x))


def _sigmoid(x):
    return np.where(x < 0, np.exp(np.minimum(x, 0.0)), 1.0) / (1.0 + np.exp(-np.abs(x)))


def _sine_of_quarters(c):
    return np.sin(0.5 * np.pi * c)


# Klambauer et al., Self-Normalizing Neural Networks, 2017.
SELU_ALPHA = 1.6732632423543772
SELU_SLOPE = 1.0507009873554805


def exponential_unit(name: str, alpha: float = 1.0, stretch: float = 1.0, slope: float = 1.0) -> Function:
    """slope * x above 0, alpha * (exp(x / stretch) - 1) below: ELU, CELU, SELU."""

    def core(x):
        return alpha * np.expm1(np.minimum(x, 0.0) / stretch)

    return Function(
        name,
        "hinge",
        lambda x: slope * np.maximum(x, 0.0) + core(x),
        core,
        abs(alpha) / stretch**2,
        low=None,
        high=0.0,
        low_limit=-alpha,
        slope=slope,
        stretch=stretch,
    )


_FUNCTIONS = (
    Function("gelu", "even", _with_residual(_residual_gelu), _residual_gelu, 0.8),
    Function("gelu_tanh", "even", _with_residual(_residual_gelu_tanh), _residual_gelu_tanh, 1.2),
    Function("silu", "even", _with_residual(_residual_silu), _residual_silu, 0.51),
    Function("softplus", "even", _with_residual(_residual_softplus), _residual_softplus, 0.26),
    Function("tanh", "odd", np.tanh, np.tanh, 0.78, high_limit=1.0),
    Function("erf", "odd", erf, erf, 0.98, high_limit=1.0),
    Function("sigmoid", "logistic", _sigmoid, lambda a: 0.5 * np.tanh(0.5 * a), 0.1, high_limit=0.5),
    Function("mish", "hinge", _mish, _mish, 1.2, low=None, high_limit=None),
    exponential_unit("elu"),
    exponential_unit("selu", SELU_SLOPE * SELU_ALPHA, slope=SELU_SLOPE),
    exponential_unit("celu"),
    Function("sin", "sine", np.sin, _sine_of_quarters, 2.5, high=1.0, pins=(0.0, 1.0)),
    Function("cos", "cosine", np.cos, _sine_of_quarters, 2.5, high=1.0, pins=(0.0, 1.0)),
    Function("exp", "exp", np.exp, np.exp2, 0.7, low=-0.5, high=0.5, pins=(0.0,), relative=True),
    Function("exp2", "exp", np.exp2, np.exp2, 0.7, low=-0.5, high=0.5, pins=(0.0,), relative=True),
    Function("log", "log", np.log, np.log1p, 1.0, low=0.0, high=1.0, pins=(0.0,)),
    Function("reciprocal", "reciprocal", lambda x: 1.0 / x, relative=True),
    Function("rsqrt", "rsqrt", lambda x: 1.0 / np.sqrt(x), relative=True),
    Function("sqrt", "sqrt", np.sqrt, relative=True),
    Function("hardsigmoid", "hardsigmoid", _hardsigmoid),
    Function("hardswish", "hardswish", _hardswish),
)

FUNCTIONS: dict[str, Function] = {function.name: function for function in _FUNCTIONS}
"""All named functions without parameters; ``families`` has those with one."""
