"""Functions with a parameter, by names such as ``elu(0.5)``, ``celu(1.3)`` and ``pow(1.7)``; derivatives, ``gelu'``."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from tvm_qfp8.errors import TableError
from tvm_qfp8.tables.derivatives import derivative_of
from tvm_qfp8.tables.functions import FUNCTIONS, Function, exponential_unit

LARGEST_PRODUCT = 8.0
NAME = re.compile(r"(\w+)\(([^()]+)\)")


def _elu(name: str, alpha: float) -> Function:
    return exponential_unit(name, _positive(name, alpha))


def _celu(name: str, alpha: float) -> Function:
    return exponential_unit(name, _positive(name, alpha), stretch=alpha)


def _positive(name: str, alpha: float) -> float:
    if not 1e-3 <= alpha <= 1e3:
        raise TableError(f"alpha of {name} is supported from 0.001 to 1000")
    return alpha


def _power(name: str, exponent: float) -> Function:
    if not (np.isfinite(exponent) and 0 < abs(exponent) <= 64):
        raise TableError(f"the exponent of {name} is supported up to 64 in magnitude, except 0")
    whole = exponent % 1 == 0
    product = (whole or (exponent > 0 and (2 * exponent) % 1 == 0)) and abs(exponent) <= LARGEST_PRODUCT

    def reference(x):
        # C's pow differs in one point: it takes -infinity for a positive base.
        return np.power(x, exponent) if whole else np.where(x < 0, np.nan, np.power(np.abs(x), exponent))

    return Function(
        name,
        "product" if product else "power",
        reference,
        relative=True,
        exponent=exponent,
    )


FAMILIES: dict[str, Callable[[str, float], Function]] = {"elu": _elu, "celu": _celu, "pow": _power}
"""By name: the function of ``(full name, parameter)``."""


@lru_cache(maxsize=256)
def find_function(name: str) -> Function:
    """The function called ``name``.

    Raises
    ------
    TableError
        An unknown name or a parameter out of range.
    """
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    if name.endswith("'"):
        return derivative_of(find_function(name[:-1]))
    match = NAME.fullmatch(name)
    if match is not None and match[1] in FAMILIES:
        try:
            parameter = float(match[2])
        except ValueError:
            raise TableError(
                f"the parameter of {name} is no number; write for example {match[1]}(1.5)"
            ) from None
        return FAMILIES[match[1]](name, parameter)
    known = ", ".join([*FUNCTIONS, *(f"{family}(number)" for family in FAMILIES)])
    raise TableError(f"function {name!r} is unknown; named ones are {known}; or pass a callable and domain")
