"""Relax operators that are replaced by a table, and the table's function."""

from __future__ import annotations

from typing import Any

import numpy as np

from tvm_qfp8.errors import TableError
from tvm_qfp8.tables.families import find_function

FUNCTIONS = {
    "relax.nn.gelu": "gelu",
    "relax.nn.gelu_tanh": "gelu_tanh",
    "relax.nn.silu": "silu",
    "relax.nn.softplus": "softplus",
    "relax.sigmoid": "sigmoid",
    "relax.tanh": "tanh",
    "relax.erf": "erf",
    "relax.exp": "exp",
    "relax.log": "log",
    "relax.sin": "sin",
    "relax.cos": "cos",
    "relax.qfp8.mish": "mish",
    "relax.qfp8.selu": "selu",
}
FAMILIES = {"relax.qfp8.elu": "elu", "relax.qfp8.celu": "celu", "relax.power": "pow"}
"""Operators whose second argument is the parameter."""


def function_of(operator: str, arguments: tuple[Any, ...]) -> str | None:
    """The name of the function that a call computes; None where it has no table.

    ``arguments`` are the call's, numbers and constants as plain numbers or arrays.
    """
    if operator not in FAMILIES:
        return FUNCTIONS.get(operator)
    parameter = arguments[1] if len(arguments) == 2 else None
    if not isinstance(parameter, int | float | np.ndarray) or np.size(parameter) != 1:
        return None
    name = f"{FAMILIES[operator]}({float(np.asarray(parameter).reshape(()))!r})"
    try:
        find_function(name)
    except TableError:
        return None
    return name
