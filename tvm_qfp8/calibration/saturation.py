"""Which values lie between 0 and a limit that they reach, whatever the input: those of ReLU6 and of sigmoids.

Their scale is known without samples. A limit that is out of reach, as that of a clip that only guards against infinity,
would leave few steps for what is there; a softmax over many classes is far below 1.
"""

from __future__ import annotations

from typing import Any

from tvm_qfp8.calibration.evaluate import MOVING_STEPS, Name, Program, Step

HIGHEST = 8.0
"""Limits of a clip that are taken for a part of the network, as ReLU6 is."""

KEEP = MOVING_STEPS | {"relax.nn.max_pool2d"}


def saturated(program: Program) -> dict[str, float]:
    """The variables of ``program`` that hold such values, and their limits."""
    found: dict[str, float] = {}
    for step in program.steps:
        limit = _limit(step, found)
        if limit is not None:
            found[step.name] = limit
    return found


def _limit(step: Step, found: dict[str, float]) -> float | None:
    if step.operator == "relax.sigmoid":
        return 1.0
    if step.operator == "relax.clip":
        low, high = map(float, step.arguments[1:])
        return high if low == 0 and 0 < high <= HIGHEST else None
    return _limit_of(step.arguments[0], found) if step.operator in KEEP else None


def _limit_of(argument: Any, found: dict[str, float]) -> float | None:
    """The largest of a tuple's parts."""
    if isinstance(argument, Name):
        return found.get(argument.name)
    if not isinstance(argument, tuple):
        return None
    limits = [_limit_of(part, found) for part in argument]
    known = [limit for limit in limits if limit is not None]
    return max(known) if known and len(known) == len(limits) else None
