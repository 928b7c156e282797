"""Linear layers whose values a logarithm reads, as in mel spectrograms: they keep float32.

An error is small beside the largest value of a layer's output. A logarithm shows the small values as large as the
others, and their errors with them: a spectrum that is 35 dB from its error is 17 dB from it in decibels.

From a logarithm back to a linear layer a network bounds, scales and sums. What that layer reads is often a spectrum,
sums and squares of the results of others: transforms of a signal, no activation function between them.
"""

from __future__ import annotations

from tvm_qfp8.calibration.evaluate import Program
from tvm_qfp8.calibration.linear import LINEAR, LinearSteps
from tvm_qfp8.data_movement import MOVES_DATA

REASON = "a logarithm reads its values, where errors beside the small ones count as much"
SUMS = MOVES_DATA | {
    "alias", "tuple_get_item", "relax.abs", "relax.add", "relax.divide", "relax.mean", "relax.multiply",
    "relax.negative", "relax.power", "relax.sqrt", "relax.square", "relax.subtract", "relax.sum",
}  # fmt: skip
BOUNDS = {"relax.clip", "relax.maximum", "relax.minimum"}
"""Between a logarithm and the layer before it; further back they are activation functions."""


def keep_in_float32(program: Program, found: LinearSteps) -> None:
    """Move these layers from what is quantized to what is skipped, in place."""
    for name in _before_logarithm(program):
        if found.linear.pop(name, None) or found.products.pop(name, None):
            found.skipped[name] = REASON


def _before_logarithm(program: Program) -> set[str]:
    """Names of the linear steps."""
    steps = {step.name: step for step in program.steps}
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
