"""Elementwise Relax operators as float32 TIR expressions, on vectors of any width.

Only operators whose result IEEE 754 fixes to the bit stand here; every other nonlinear function is a table
(``interpolate.py``). ``maximum(0, x)`` keeps a NaN, ``minimum`` and ``clip`` likewise: see the format's rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx

from tvm_qfp8.topi.float_contract import add, bind, dtype_of, like, mul, sub


def _relu(_attrs, x):
    # max(0, x) is "0 > x ? 0 : x", which keeps NaN.
    return tirx.max(like(0.0, x), x)


def _clip(bounds, x):
    low, high = bounds
    return tirx.min(like(high, x), tirx.max(like(low, x), x))


def _leaky_relu(attrs, x):
    return tirx.Select(x > like(0.0, x), x, mul(x, like(float(attrs.alpha), x)))


def _prelu(_attrs, x, slope):
    return tirx.Select(x > like(0.0, x), x, mul(x, slope))


def _square(_attrs, x):
    return mul(x, x)


def _sqrt(_attrs, x):
    return tirx.sqrt(x)


def _rsqrt(_attrs, x):
    return like(1.0, x) / bind(tirx.sqrt(x))


def _abs(_attrs, x):
    return tirx.abs(x)


def _negative(_attrs, x):
    # 0 - x would turn +0 into +0; flipping the sign bit is exact.
    bits = tirx.reinterpret(dtype_of(x).replace("float32", "int32"), x)
    return tirx.reinterpret(dtype_of(x), bits ^ like(-(2**31), x, "int32"))


ELEMENTWISE: dict[str, Callable] = {
    "relax.add": lambda _attrs, a, b: add(a, b),
    "relax.subtract": lambda _attrs, a, b: sub(a, b),
    "relax.multiply": lambda _attrs, a, b: mul(a, b),
    "relax.divide": lambda _attrs, a, b: a / b,
    "relax.maximum": lambda _attrs, a, b: tirx.max(a, b),
    "relax.minimum": lambda _attrs, a, b: tirx.min(a, b),
    "relax.nn.relu": _relu,
    "relax.nn.leakyrelu": _leaky_relu,
    "relax.nn.prelu": _prelu,
    "relax.clip": _clip,
    "relax.square": _square,
    "relax.sqrt": _sqrt,
    "relax.rsqrt": _rsqrt,
    "relax.abs": _abs,
    "relax.negative": _negative,
}


def emit_elementwise(name: str, attrs, arguments: Sequence):
    """The TIR expression of Relax operator ``name``; KeyError for one that is not elementwise here."""
    return bind(ELEMENTWISE[name](attrs, *arguments))
