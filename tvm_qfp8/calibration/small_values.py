"""Linear layers of whose values the small ones count as much as the large: they keep float32.

An error is small beside the largest value of a layer's output. A logarithm, as in mel spectrograms, shows the small
values as large as the others, and their errors with them: a spectrum that is 35 dB from its error is 17 dB from it in
decibels. A divisor near zero, as in attention that is normalised after its products (Katharopoulos et al.,
"Transformers are RNNs", ICML 2020, eq. 5), may be rounded to zero.

From a logarithm back to a linear layer a network bounds, scales and sums. What that layer reads is often a spectrum,
sums and squares of the results of others: transforms of a signal, no activation function between them. From a divisor
back it only bounds and moves: a sum, as in a norm, is as right as its large terms.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tvm_qfp8.calibration.evaluate import MOVING_STEPS, Name, Program, Step
from tvm_qfp8.calibration.linear import LINEAR, LinearSteps

LOGARITHM = "a logarithm reads its values, where errors beside the small ones count as much"
DIVISOR = "others are divided by its values, of which a small one must not become zero"
SUMS = MOVING_STEPS | {
    "relax.abs", "relax.add", "relax.divide", "relax.mean", "relax.multiply",
    "relax.negative", "relax.power", "relax.sqrt", "relax.square", "relax.subtract", "relax.sum",
}  # fmt: skip
BOUNDS = {"relax.clip", "relax.maximum", "relax.minimum"}
"""Between a logarithm and the layer before it; further back they are activation functions."""

MOVES = MOVING_STEPS | {"relax.abs"}
GUARDS = {"relax.add", "relax.clip", "relax.maximum"}
"""Before a division, with constants of at most ``SMALLEST_DIVISOR``; larger ones keep a divisor from zero."""

SMALLEST_DIVISOR = 1e-3


def keep_in_float32(program: Program, found: LinearSteps) -> None:
    """Move these layers from what is quantized to what is skipped, in place."""
    steps = {step.name: step for step in program.steps}
    reasons = dict.fromkeys(_divisors(program, steps), DIVISOR)
    reasons |= dict.fromkeys(_before_logarithm(program, steps), LOGARITHM)
    for name, reason in reasons.items():
        if found.linear.pop(name, None) or found.products.pop(name, None):
            found.skipped[name] = reason


def _divisors(program: Program, steps: dict[str, Step]) -> set[str]:
    """Names of the linear steps that something is divided by."""
    pending = [
        step.arguments[1].name
        for step in program.steps
        if step.operator == "relax.divide" and isinstance(step.arguments[1], Name)
    ]
    found: set[str] = set()
    while pending:
        step = steps.get(pending.pop())
        if step is None or step.name in found:
            continue
        if step.operator in LINEAR:
            found.add(step.name)
        elif (
            step.operator in MOVES or step.operator in GUARDS and _largest_constant(step) <= SMALLEST_DIVISOR
        ):
            pending += step.reads
    return found


def _largest_constant(step: Step) -> float:
    """Of a guard's lower bound or summand; infinity if that is none."""
    other: Any = step.arguments[1]
    if step.operator != "relax.clip" and isinstance(other, Name):
        other = step.arguments[0]
    return float("inf") if isinstance(other, Name) else float(np.max(other))


def _before_logarithm(program: Program, steps: dict[str, Step]) -> set[str]:
    """Names of the linear steps whose values, or sums of them, a logarithm reads."""
    found: set[str] = set()
    seen: set[tuple[str, bool]] = set()
    pending = [(name, True) for step in program.steps if step.operator == "relax.log" for name in step.reads]
    while pending:
        name, near = pending.pop()
        step = steps.get(name)
        if step is None or (name, near) in seen:
            continue
        seen.add((name, near))
        if step.operator in LINEAR:
            found.add(name)
            near = False
        elif step.operator not in SUMS and not (near and step.operator in BOUNDS):
            continue
        pending += [(read, near) for read in step.reads]
    return found
