"""BatchNorm statistics of an imported graph, estimated anew in one calibration walk with quantized tensors flowing.

Where the walk meets the mark of a BatchNorm layer (``relax.qfp8.batchnorm_input``), all layers before it are quantized,
corrected and, if that served, recalibrated. Mean and variance of what arrives are taken over three of four samples and
judged on the fourth: the layer takes them if they describe the held-out values clearly better than the old ones do, as
normal distributions. Then both flows, the float32 one as well, go on with what was decided, since the float32 network
with the new statistics is the one to be quantized afterwards. After Nagel et al., A White Paper on Neural Network
Quantization, 2021, who normalize batch by batch; a graph compiled for one image has no batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm

from tvm_qfp8.calibration.calibrate import TOKEN_MASK, Progress, walk_options
from tvm_qfp8.calibration.embeddings import quantized_embeddings
from tvm_qfp8.calibration.evaluate import Program, Step
from tvm_qfp8.calibration.linear import find_linear
from tvm_qfp8.calibration.plan import QuantizationPlan
from tvm_qfp8.calibration.recalibration import HOLD_OUT_EVERY, LEAST_GAIN
from tvm_qfp8.calibration.samples import Batches
from tvm_qfp8.calibration.spill import Spill
from tvm_qfp8.calibration.walk import Group, Walk
from tvm_qfp8.config import Config
from tvm_qfp8.errors import CalibrationError

MARK = "relax.qfp8.batchnorm_input"


@dataclass(frozen=True)
class BatchnormStatistics:
    """What a BatchNorm layer normalizes by: float64 ``(channels,)`` each, and what is added to the variance."""

    mean: np.ndarray
    variance: np.ndarray
    epsilon: float


@dataclass(frozen=True)
class Estimate:
    """New statistics of a BatchNorm layer, float64 ``(channels,)``, with the scores of the old and the new ones.

    ``samples`` is how many it comes from.
    """

    mean: np.ndarray
    variance: np.ndarray
    before: float
    after: float
    samples: int

    @property
    def better(self) -> bool:
        """Whether the layer takes them."""
        return self.after > self.before + LEAST_GAIN


def estimate_batchnorms(
    mod: tvm.IRModule,
    samples: Batches,
    old: Sequence[BatchnormStatistics],
    config: Config,
    progress: Progress | None = None,
) -> dict[int, Estimate]:
    """New statistics of the marked BatchNorm layers of a canonical module, by their numbers.

    Parameters
    ----------
    mod : IRModule
        In canonical form, with the marks of ``mark_batchnorms``.
    samples : as for ``calibrate``
    old : sequence of BatchnormStatistics
        Of the marked layers, by their numbers.

    Raises
    ------
    CalibrationError
        As ``calibrate``; or a layer receives values that are not finite.
    """

    options = walk_options(config)
    program, plan = Program(mod), QuantizationPlan()
    steps = find_linear(program, config.skip)
    plan.embeddings = quantized_embeddings(program, config.skip)
    report = progress or (lambda stage, done, total: None)
    with Spill() as spill, np.errstate(all="ignore"):
        walk = _StatisticsWalk(program, steps, spill, plan, old=old, token_mask=TOKEN_MASK, **options)
        walk.spill_inputs(samples)
        walk.run(lambda: report("recalibrate BatchNorm", len(walk.estimates), len(old)))
    return walk.estimates


class _StatisticsWalk(Walk):
    """A calibration walk that estimates statistics on its way."""

    def __init__(self, *arguments: Any, old: Sequence[BatchnormStatistics], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.old = old
        self.estimates: dict[int, Estimate] = {}

    def _needed_steps(self) -> list[Step]:
        """Steps that some mark depends on."""
        needed: set[str] = set()
        steps = []
        for step in reversed(self.program.steps):
            if step.operator == MARK or step.name in needed:
                needed.update(step.reads)
                steps.append(step)
        return steps[::-1]

    def groups(self) -> Iterator[Group]:
        """With the steps behind the last quantized operator, where a mark may be."""
        yield from super().groups()
        last = max((i for i, step in enumerate(self.steps) if step.name in self.alone), default=-1)
        if self.steps[last + 1 :]:
            yield self.steps[last + 1 :]

    def run_block(self, steps: list[Step]) -> None:
        """Marks stand alone, so that all samples have arrived at one before any goes on."""
        block: list[Step] = []
        for step in steps:
            if step.operator != MARK:
                block.append(step)
                continue
            if block:
                super().run_block(block)
            super().run_block([self._recalibrated(step)])
            block = []
        if block:
            super().run_block(block)

    def _recalibrated(self, mark: Step) -> Step:
        """The mark as a step that makes the arithmetic behind it, by the old statistics, one by the chosen ones."""
        _, number, axis = mark.arguments
        old, estimate = self.old[number], self._estimate(mark, axis, self.old[number])
        self.estimates[number] = estimate
        if not estimate.better:
            return mark
        factor = np.sqrt((old.variance + old.epsilon) / (estimate.variance + old.epsilon))
        shift = old.mean - estimate.mean * factor
        after = (1,) * (len(mark.spec.shape) - 1 - axis)  # type: ignore[union-attr]
        a, b = (vector.astype(np.float32).reshape(-1, *after) for vector in (factor, shift))
        (source,) = mark.reads
        return replace(mark, run=lambda values: values[source] * a + b)

    def _estimate(self, mark: Step, axis: int, old: BatchnormStatistics) -> Estimate:
        fitted, held_out = _Moments(), _Moments()
        (source,) = mark.reads
        for sample in range(self.samples):
            value = self._read(source, self._flow(source), sample)
            held = sample % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
            (held_out if held else fitted).add(np.moveaxis(value, axis, -1))
        mean, variance = fitted.mean_and_variance()
        judge = held_out if held_out.count else fitted
        before = judge.likelihood(old.mean, old.variance + old.epsilon)
        after = judge.likelihood(mean, variance + old.epsilon)
        return Estimate(mean, variance, before, after, fitted.samples)


class _Moments:
    """Sums of values and squares per channel, in float64."""

    def __init__(self) -> None:
        self.samples = self.count = 0
        self._sum: Any = 0.0
        self._squares: Any = 0.0

    def add(self, value: np.ndarray) -> None:
        """One sample's values, channels last."""
        rows = value.reshape(-1, value.shape[-1]).astype(np.float64)
        self.samples += 1
        self.count += len(rows)
        self._sum = self._sum + rows.sum(axis=0)
        self._squares = self._squares + np.square(rows, out=rows).sum(axis=0)

    def mean_and_variance(self) -> tuple[np.ndarray, np.ndarray]:
        """The variance is the unbiased one, as torch keeps it."""
        mean = self._sum / self.count
        variance = np.maximum(self._squares / self.count - np.square(mean), 0.0)
        if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
            raise CalibrationError(
                "a BatchNorm layer received NaN or infinity; give samples that the model can take"
            )
        return mean, variance * (self.count / max(self.count - 1, 1))

    def likelihood(self, mean: np.ndarray, variance: np.ndarray) -> float:
        """Mean over values and channels of the log-density of a normal distribution, up to a constant."""
        distance = (self._squares - 2 * mean * self._sum) / self.count + np.square(mean)
        return float(-0.5 * (np.log(variance) + distance / variance).mean())
