"""``max_drop``: wider layouts, then the fewest layers in float32 that keep a metric of the user's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tvm

from tvm_qfp8.calibration.evaluate import evaluate
from tvm_qfp8.calibration.plan import QuantizationPlan
from tvm_qfp8.calibration.quantized import QuantizedProgram
from tvm_qfp8.calibration.sensitivity import layer_effects
from tvm_qfp8.errors import CalibrationError
from tvm_qfp8.layer_effect import LayerEffect

Run = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]
Metric = Callable[[Run], float]
"""Score of a network given as ``run(inputs by name) -> outputs``; higher is better."""


def keep_within(
    mod: tvm.IRModule,
    plan: QuantizationPlan,
    samples: Sequence[Mapping[str, np.ndarray]],
    metric: Metric,
    max_drop: float,
    max_error: float,
    progress: Callable[[str, int, int], None] | None = None,
    wider: Callable[[], QuantizationPlan] | None = None,
) -> QuantizationPlan:
    """The plan, or the wider one with as many of its most harmful layers left in float32 as the metric asks for.

    The layers are ranked by ``layer_effects``; how many of the first stay float32 is found by doubling and then
    bisecting, so the metric is computed about ``2 log2(layers)`` times, by NumPy.

    Parameters
    ----------
    max_drop : float
        In percent of float32's score.
    wider : callable
        Gives the plan without linear layouts that cost accuracy; None where there is no other.

    Raises
    ------
    CalibrationError
        No samples, a score that is not finite, or a drop that stays even with every linear layer in float32.
    """
    if not samples:
        raise CalibrationError("max_drop needs calibration samples to tell which layer is to blame")
    reference = _score(metric, lambda inputs: evaluate(mod, inputs))
    limit = reference - abs(reference) * max_drop / 100

    def keeps(found: QuantizationPlan) -> bool:
        return _score(metric, QuantizedProgram(mod, found, max_error).run) >= limit

    if keeps(plan):
        return plan
    if wider is not None:
        plan = wider()
        if keeps(plan):
            return plan
    effects = layer_effects(mod, plan, samples, max_error, progress)
    low, high = 0, 1
    while not keeps(_without(plan, effects[:high])):
        if high == len(effects):
            raise CalibrationError(
                f"the metric drops by more than {max_drop} % even with all {high} linear layers in float32: "
                "lower max_error, or allow a greater max_drop"
            )
        low, high = high, min(2 * high, len(effects))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(_without(plan, effects[:middle])) else (middle, high)
    return _without(plan, effects[:high])


def _score(metric: Metric, run: Run) -> float:
    score = float(metric(run))
    if not np.isfinite(score):
        raise CalibrationError(f"the metric gave {score}; it must be a finite number, higher for better")
    return score


def _without(plan: QuantizationPlan, effects: Sequence[LayerEffect]) -> QuantizationPlan:
    names = {effect.layer for effect in effects}
    reasons = {
        e.layer: f"max_drop: outputs at {e.output_sqnr_db:.1f} dB by this layer alone" for e in effects
    }
    return dataclasses.replace(
        plan,
        linear={name: chosen for name, chosen in plan.linear.items() if name not in names},
        products={name: chosen for name, chosen in plan.products.items() if name not in names},
        embeddings={name: table for name, table in plan.embeddings.items() if name not in names},
        skipped={**plan.skipped, **reasons},
    )
