"""Derivatives of the activation functions, for training: ``gelu'`` is the derivative of ``gelu``.

The symmetry is the function's own: where f(x) - max(x, 0) is even, f' - 1/2 is odd (reduction logistic); where f is
odd, f' is even (symmetric). ``curvature`` bounds the second derivative of the core, as in ``functions``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tvm_qfp8.errors import TableError
from tvm_qfp8.tables.functions import Function, erf

# tanh, erf and exp are at their limits in float64 long before.
LARGEST = 350.0


def _half_slope_gelu(a):
    return 0.5 * erf(a / math.sqrt(2.0)) + a * np.exp(-0.5 * a * a) / math.sqrt(2.0 * math.pi)


def _half_slope_gelu_tanh(a):
    a = np.minimum(a, LARGEST)
    tanh = np.tanh(math.sqrt(2.0 / math.pi) * (a + 0.044715 * a**3))
    inner = math.sqrt(2.0 / math.pi) * (1.0 + 3 * 0.044715 * a * a)
    return 0.5 * tanh + 0.5 * a * (1.0 - tanh * tanh) * inner


def _slope_sigmoid(a):
    return 0.25 / np.cosh(0.5 * np.minimum(np.abs(a), LARGEST)) ** 2


def _half_slope_silu(a):
    a = np.minimum(a, LARGEST)
    return 0.5 * np.tanh(0.5 * a) + a * _slope_sigmoid(a)


def _slope_tanh(a):
    return 1.0 / np.cosh(np.minimum(np.abs(a), LARGEST)) ** 2


def _slope_mish(x):
    x = np.clip(x, -LARGEST, LARGEST)
    tanh = np.tanh(np.log1p(np.exp(x)))
    return tanh + x * (1.0 - tanh * tanh) / (1.0 + np.exp(-x))


def _half_plus_odd(core):
    return lambda x: 0.5 + np.sign(x) * core(np.minimum(np.abs(x), LARGEST))


def _slope_hardsigmoid(x):
    return np.where(np.abs(x) < 3.0, 1.0 / 6.0, np.where(np.isnan(x), np.nan, 0.0))


def _slope_hardswish(x):
    inside = np.clip(x, -3.0, 3.0) / 3.0 + 0.5
    return np.where(x <= -3.0, 0.0, np.where(x >= 3.0, 1.0, inside))


def _even_about_half(name: str, core: Callable[[np.ndarray], np.ndarray], curvature: float) -> Function:
    return Function(name, "logistic", _half_plus_odd(core), core, curvature, high_limit=0.5)


_DERIVATIVES = (
    _even_about_half("gelu'", _half_slope_gelu, 1.2),
    _even_about_half("gelu_tanh'", _half_slope_gelu_tanh, 1.3),
    _even_about_half("silu'", _half_slope_silu, 0.32),
    Function(
        "softplus'",
        "logistic",
        lambda x: 0.5 + 0.5 * np.tanh(0.5 * x),
        lambda a: 0.5 * np.tanh(0.5 * a),
        0.1,
        high_limit=0.5,
    ),
    Function("tanh'", "symmetric", _slope_tanh, _slope_tanh, 2.1),
    Function("sigmoid'", "symmetric", _slope_sigmoid, _slope_sigmoid, 0.13),
    Function("mish'", "direct", _slope_mish, _slope_mish, 0.7, low=None, high_limit=1.0),
    Function("hardsigmoid'", "hardsigmoid_slope", _slope_hardsigmoid),
    Function("hardswish'", "hardswish_slope", _slope_hardswish),
)
DERIVATIVES: dict[str, Function] = {function.name: function for function in _DERIVATIVES}
"""By name, except the exponential units, which have parameters."""


def derivative_of(function: Function) -> Function:
    """The derivative of a named activation function; at a kink, what torch's backward takes: the lower side's.

    Raises
    ------
    TableError
        For functions that are no activations.
    """
    name = function.name + "'"
    if name in DERIVATIVES:
        return DERIVATIVES[name]
    if function.reduction != "hinge" or function.high != 0.0:
        known = ", ".join([*DERIVATIVES, "elu'", "elu(number)'", "selu'", "celu'", "celu(number)'"])
        raise TableError(f"{function.name} has no table of its derivative; {known} have")
    scale, stretch = -function.low_limit / function.stretch, function.stretch

    def core(x):
        return scale * np.exp(np.minimum(x, 0.0) / stretch)

    return Function(
        name,
        "step",
        lambda x: np.where(x > 0.0, function.slope, core(x)),
        core,
        scale / stretch**2,
        low=None,
        high=0.0,
        slope=function.slope,
        stretch=stretch,
    )
