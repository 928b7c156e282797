"""Which sums of a residual network everything may read as codes.

A sum of large images goes to the next layer as codes and, finer, to the next sum: two tensors where other compilers
have one. Where the codes do for both, a third to a half of the memory traffic of a block goes. Every sum that is
rounded stays rounded down to the outputs, though, so what that does to them is measured, each tensor alone; the tensors
are taken in the order of error for each element, up to ``SUM_LOSS_DB``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tvm_qfp8.calibration.choose_activation import ANY, Grade
from tvm_qfp8.calibration.evaluate import Program, Step, TensorSpec
from tvm_qfp8.calibration.grades import LEAST_DB
from tvm_qfp8.calibration.linear import Linear
from tvm_qfp8.calibration.losses import Comparison
from tvm_qfp8.calibration.plan import ActivationQuantization
from tvm_qfp8.calibration.propagate import Change, Overlay

SUM_LOSS_DB = 0.3
"""Of the outputs' signal to error, estimated by the sum of what rounding each tensor alone does to them."""

LEAST_SIZE = 2**17
"""Elements of an image: of smaller ones the finer version stays in cache, and costs next to nothing."""


def sums_as_codes(
    compared: Comparison,
    grades: Mapping[str, Grade],
    samples: Sequence[Mapping[str, np.ndarray]],
    byte_loss_db: float | None = None,
) -> set[str]:
    """The variables that sums, too, may read as the codes that layers read.

    Parameters
    ----------
    compared : Comparison
        Of all grades.
    grades : mapping of variable to Grade
        What was chosen; others have their best layouts.
    samples : sequence of {input name: array}
    byte_loss_db : float or None
        As in ``Config``: with 0 there are none, nor by default where outputs have no error to spare.
    """
    few = compared.few(samples)
    has_none_to_spare = compared.of_activations() > len(few) * 10 ** (-LEAST_DB / 10)
    if byte_loss_db == 0 or (byte_loss_db is None and has_none_to_spare):
        return set()
    images = _images(compared.program)
    found: dict[str, tuple[ActivationQuantization, list[Step]]] = {}
    for name, linears in compared.readers.items():
        activation = compared.activation(name, grades.get(name, ANY))
        if (
            name in images
            and isinstance(linears, list)
            and activation is not None
            and activation.has_one_scale
        ):
            found[name] = activation, _sums_that_read(compared.program, images[name], linears)
    lost = {name: 0.0 for name, (_, sums) in found.items() if sums}
    with np.errstate(all="ignore"):
        for sample in few if lost else ():
            values, lost_by = compared.in_float32(sample)
            for name in lost:
                lost[name] += lost_by(_changes(*found[name], name, values))
    budget = compared.error(grades) * (10 ** (SUM_LOSS_DB / 10) - 1)
    chosen = set()
    for name in sorted(lost, key=lambda name: lost[name] / _size(images[name])):
        if lost[name] <= budget:  # never for what is infinite or no number
            budget -= lost[name]
            chosen.add(name)
    return chosen


def _images(program: Program) -> dict[str, Step]:
    """Large ones that are no result."""
    results = program.result_names()
    return {
        step.name: step
        for step in program.steps
        if isinstance(step.spec, TensorSpec)
        and len(step.spec.shape) == 4
        and _size(step) >= LEAST_SIZE
        and step.name not in results
    }


def _size(step: Step) -> int:
    return int(np.prod(step.spec.shape))  # type: ignore[union-attr]


def _sums_that_read(program: Program, image: Step, linears: Sequence[Linear]) -> list[Step]:
    """The additions that read an image besides layers; none where something else does, or one comes first."""
    own = {linear.step.name for linear in linears}
    readers = [step for step in program.steps if image.name in step.reads]
    others = [step for step in readers if step.name not in own]
    plain = all(step.operator == "relax.add" and step.spec == image.spec for step in others)
    return others if plain and readers[0].name in own else []


def _changes(
    activation: ActivationQuantization, sums: Sequence[Step], name: str, values: Mapping[str, Any]
) -> dict[str, Change]:
    rounded = {name: activation.rounded(values[name])}
    return dict.fromkeys((step.name for step in sums), lambda step, seen: step.run(Overlay(rounded, seen)))
