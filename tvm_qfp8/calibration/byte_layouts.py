"""Which layers get linear layouts: those where they cost the outputs little for the multiply-adds they save.

Linear grid values are bytes, of which an instruction multiplies twice as many as of int16 values with VNNI (x86), and
four times as many with Arm's dot products. Linear layouts have fewer fine steps, though, and how much that costs
differs from layer to layer by a factor of a thousand. So each layer's errors in its best layout and in linear ones are
compared at the module's outputs, and layers are taken in the order of error for each multiply-add, up to a budget. The
choice does not look at the target: a module gives the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import tvm

from tvm_qfp8.calibration.evaluate import Program
from tvm_qfp8.calibration.linear import find_linear
from tvm_qfp8.calibration.plan import QuantizationPlan
from tvm_qfp8.calibration.sensitivity import layer_effects

MOST_LOST_DB = 0.5
"""Of the outputs' signal to error, estimated by the sum of the layers' errors."""


def choose_byte_layouts(
    mod: tvm.IRModule,
    plan: QuantizationPlan,
    samples: Sequence[Mapping[str, np.ndarray]],
    max_error: float = 1e-3,
    progress: Callable[[str, int, int], None] | None = None,
) -> QuantizationPlan:
    """The plan with linear layouts where they cost little.

    Parameters
    ----------
    mod : IRModule
        In canonical form.
    plan : QuantizationPlan
        Of ``calibrate``; ``in_bytes`` holds what may be chosen.
    samples : sequence of {input name: array}
        A few are enough.
    """
    if not plan.in_bytes or not samples:
        return plan
    report = progress or (lambda stage, done, total: None)

    def errors(found: QuantizationPlan, half: int) -> dict[str, float]:
        def half_done(_stage: str, done: int, total: int) -> None:
            report("choose layouts", half * total + done, 2 * total)

        effects = layer_effects(mod, found, samples, max_error, half_done, plan.in_bytes)
        return {effect.layer: 10 ** (-effect.output_sqnr_db / 10) for effect in effects}

    now, then = errors(plan, 0), errors(replace(plan, linear={**plan.linear, **plan.in_bytes}), 1)
    budget = sum(now.values()) * (10 ** (MOST_LOST_DB / 10) - 1)
    linear = find_linear(Program(mod)).linear
    # Layers that read one tensor go together: it is encoded once.
    readers: dict[str, list[str]] = {}
    for name in plan.in_bytes:
        readers.setdefault(linear[name].source, []).append(name)
    cost = {source: sum(then[n] - now[n] for n in names) for source, names in readers.items()}
    macs = {source: sum(linear[n].macs for n in names) for source, names in readers.items()}
    chosen: list[str] = []
    for source in sorted(readers, key=lambda source: cost[source] / macs[source]):
        if cost[source] <= budget:
            budget -= max(cost[source], 0.0)
            chosen += readers[source]
    return replace(plan, linear={**plan.linear, **{name: plan.in_bytes[name] for name in chosen}})
