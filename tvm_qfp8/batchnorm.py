"""``recalibrate_batchnorm``: BatchNorm statistics of an imported network that fit its quantized tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import tvm

from tvm_qfp8.calibration import Metric, Program, QuantizedProgram, calibrate, estimate_batchnorms
from tvm_qfp8.calibration.batchnorm import MARK, BatchnormStatistics
from tvm_qfp8.calibration.evaluate import TensorSpec
from tvm_qfp8.calibration.recalibration import LEAST_IMAGES, Recalibration
from tvm_qfp8.calibration.samples import Batches
from tvm_qfp8.calibration.stored_samples import StoredSamples
from tvm_qfp8.config import Config
from tvm_qfp8.errors import CalibrationError
from tvm_qfp8.importers import Imported, Shapes, load_model
from tvm_qfp8.relay_passes.batchnorm_marks import (
    find_batchnorms,
    mark_batchnorms,
    with_statistics,
)
from tvm_qfp8.relay_passes.prepare import prepare

Progress = Callable[[str, int, int], None]


def recalibrate_batchnorm(
    mod: Any,
    calibration: Batches,
    *,
    params: Mapping[str, np.ndarray | float] | None = None,
    input_shapes: Shapes | None = None,
    config: Config | None = None,
    metric: Metric | None = None,
    progress: Progress | None = None,
) -> tuple[tvm.IRModule, Recalibration]:
    """Estimate BatchNorm's statistics anew with quantized tensors flowing, where that does not make things worse.

    ``compile(..., config=Config(recalibrate_batchnorm=True))`` does this and compiles the result.

    Parameters
    ----------
    mod, params, input_shapes, config, progress
        As for ``compile``; a torch module in memory has ``tvm_qfp8.torch.recalibrate_batchnorm``. BatchNorm has to
        be in the model: exporters fold it into convolutions unless told not to.
    calibration : iterable of {input name: array}, or path of an .npz
        Consumed once; memory does not grow with their number. They have to be what the network is for: some thousand
        images, and without a metric at least 256, or the old statistics stay.
    metric : callable ``(run) -> float``
        Scores a network given as ``run({input name: array}) -> outputs``, higher for better: the quantized network with
        the new statistics has to score more than with the old ones. Without it, and before, each layer takes the
        new ones only if every fourth sample, held out, is more likely under them, as normal distributions: by 0.01 of
        the logarithm, mean over values and channels.

    Returns
    -------
    (IRModule, Recalibration)
        A module for ``compile``, and what was done: ``print`` it.

    Raises
    ------
    CalibrationError
        No sample, one that does not fit, or no BatchNorm layer with constant statistics.
    QFP8Error
        As ``compile``.
    """
    imported = load_model(mod, params=params, input_shapes=input_shapes).mod
    with StoredSamples(calibration, Program(prepare(imported)).inputs) as samples:
        return recalibrated(imported, samples, config or Config(), metric, progress)


def recalibrated(
    mod: tvm.IRModule,
    samples: StoredSamples,
    config: Config,
    metric: Metric | None = None,
    progress: Progress | None = None,
) -> tuple[tvm.IRModule, Recalibration]:
    """``recalibrate_batchnorm`` of an imported module; the samples are read several times."""
    old = find_batchnorms(mod)
    if not old:
        raise CalibrationError(
            "the model has no BatchNorm layer with constant statistics to recalibrate (exporters fold them into "
            "convolutions unless told to keep them); leave recalibrate_batchnorm out"
        )
    marked = prepare(mark_batchnorms(mod))
    images = len(samples) * _batch(marked)
    if metric is None and images < LEAST_IMAGES:
        reason = f"{images} images are too few to tell, {LEAST_IMAGES} are needed, or a metric to judge by"
        return mod, Recalibration(0, len(old), 0, None, None, reason)
    estimates = estimate_batchnorms(marked, samples, old, config, progress)
    chosen = {
        number: BatchnormStatistics(found.mean, found.variance, old[number].epsilon)
        for number, found in estimates.items()
        if found.better
    }
    result = Recalibration(
        taken=len(chosen),
        layers=len(old),
        batches=next(iter(estimates.values())).samples,
        before=_mean(found.before for found in estimates.values()),
        after=_mean(found.after if found.better else found.before for found in estimates.values()),
    )
    if not chosen:
        return mod, result
    new = with_statistics(mod, chosen)
    if metric is None:
        return new, result
    before, after = (_score(prepare(candidate), samples, config, metric) for candidate in (mod, new))
    better = after > before
    result = dataclasses.replace(result, taken=len(chosen) if better else 0, before=before, after=after)
    return (new if better else mod), result


@contextmanager
def as_configured(
    imported: Imported,
    canonical: tvm.IRModule,
    calibration: Batches | None,
    config: Config,
    metric: Metric | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[tvm.IRModule, Batches | None]]:
    """The canonical module, recalibrated if ``config`` asks for it, and the samples to be consumed once (again).

    What was done is added to the notes of ``imported``.
    """
    if not config.recalibrate_batchnorm:
        yield canonical, calibration
        return
    if calibration is None:
        raise CalibrationError("recalibrate_batchnorm estimates statistics on calibration data; give some")
    with StoredSamples(calibration, Program(canonical).inputs) as samples:
        mod, done = recalibrated(imported.mod, samples, config, metric, progress)
        imported.notes.append(str(done))
        yield (canonical if done.kept_old else prepare(mod)), samples


def _batch(marked: tvm.IRModule) -> int:
    """How many images a sample holds: the first extent of what a BatchNorm layer receives."""
    specs = [step.spec for step in Program(marked).steps if step.operator == MARK]
    shapes = [spec.shape for spec in specs if isinstance(spec, TensorSpec)]
    if not shapes:
        raise CalibrationError(
            "no BatchNorm layer is left in canonical form; leave recalibrate_batchnorm out"
        )
    return int(shapes[0][0])


def _score(
    canonical: tvm.IRModule, samples: Iterable[Mapping[str, np.ndarray]], config: Config, metric: Metric
) -> float:
    plan = calibrate(canonical, samples, config)
    found = float(metric(QuantizedProgram(canonical, plan, config.max_error).run))
    if not math.isfinite(found):
        raise CalibrationError(f"the metric gave {found}; it has to be a finite number, higher for better")
    return found


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)
