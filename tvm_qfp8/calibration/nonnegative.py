"""Which values hold no negative numbers, whatever the input: what follows a ReLU, mostly.

Unsigned layouts have one bit more for them. With calibration samples it is seen; without, it has to be proved. NaN is
not looked at: it is encoded as 0 in every layout.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tvm_qfp8.calibration.evaluate import MOVING_STEPS, Name, Program, Step

ALWAYS = frozenset(
    {
        "relax.abs",
        "relax.exp",
        "relax.nn.relu",
        "relax.nn.softmax",
        "relax.nn.softplus",
        "relax.sigmoid",
        "relax.sqrt",
        "relax.square",
    }
)
"""Operators whose results are not negative."""

COMBINES = {
    "relax.add",
    "relax.minimum",
    "relax.multiply",
}
"""Operators whose results are not negative where no argument is."""

KEEPS = MOVING_STEPS | {
    "relax.max",
    "relax.mean",
    "relax.min",
    "relax.nn.adaptive_avg_pool2d",
    "relax.nn.avg_pool2d",
    "relax.nn.max_pool2d",
    "relax.nn.pixel_shuffle",
    "relax.sum",
}
"""Operators whose results are not negative where the first argument, or no part of it, is."""


def nonnegative(program: Program) -> set[str]:
    """Names of the variables of ``program`` that hold no negative value."""
    found: set[str] = set()
    for step in program.steps:
        if _is_nonnegative(step, found):
            found.add(step.name)
    return found


def _is_nonnegative(step: Step, found: set[str]) -> bool:
    operator, arguments = step.operator, step.arguments
    if operator in ALWAYS:
        return True
    if operator == "relax.clip":
        low, high = map(float, arguments[1:])
        return high >= 0 and (low >= 0 or _value_is(arguments[0], found))
    if operator == "relax.maximum":
        return any(_value_is(argument, found) for argument in arguments)
    if operator in KEEPS:
        return _value_is(arguments[0], found)
    return operator in COMBINES and all(_value_is(argument, found) for argument in arguments)


def _value_is(argument: Any, found: set[str]) -> bool:
    """Whether an argument, or each part of a tuple, holds no negative value."""
    if isinstance(argument, Name):
        return argument.name in found
    if isinstance(argument, tuple):
        return all(_value_is(part, found) for part in argument)
    return bool(np.all(np.asarray(argument) >= 0))
