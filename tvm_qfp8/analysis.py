"""``sensitivity``: which layer to blame when a quantized model disappoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tvm_qfp8.batchnorm import as_configured
from tvm_qfp8.calibration import LayerEffect, Program, calibrate, first_samples, layer_effects
from tvm_qfp8.calibration.samples import Batches
from tvm_qfp8.config import Config
from tvm_qfp8.errors import CalibrationError
from tvm_qfp8.importers import Shapes, load_model
from tvm_qfp8.relay_passes.lift_above_zero import lift_above_zero
from tvm_qfp8.relay_passes.prepare import prepare
from tvm_qfp8.relay_passes.trained import take_trained
from tvm_qfp8.report import Report
from tvm_qfp8.reporting import describe


def sensitivity(
    mod: Any,
    *,
    calibration: Batches | None,
    params: Mapping[str, np.ndarray | float] | None = None,
    input_shapes: Shapes | None = None,
    config: Config | None = None,
    samples: int = 4,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[LayerEffect]:
    """The quantized layers of a model, the most harmful first, by NumPy.

    Parameters
    ----------
    mod, params, input_shapes, calibration, config, progress
        As for ``compile``; the same decisions are made.
    samples : int
        The first so many calibration samples are used to compare.

    Raises
    ------
    QFP8Error
        As ``compile``; CalibrationError without samples.
    """
    return analyse(
        mod,
        calibration=calibration,
        params=params,
        input_shapes=input_shapes,
        config=config,
        samples=samples,
        progress=progress,
    ).sensitivity


def analyse(
    mod: Any,
    *,
    calibration: Batches | None,
    params: Mapping[str, np.ndarray | float] | None = None,
    input_shapes: Shapes | None = None,
    config: Config | None = None,
    samples: int = 4,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """What ``compile`` would report, without kernels, and in it what ``sensitivity`` returns; arguments as there."""
    config = config or Config()
    imported = load_model(mod, params=params, input_shapes=input_shapes)
    canonical, trained = take_trained(prepare(imported.mod), config.skip)
    with as_configured(imported, canonical, calibration, config, None, progress) as (canonical, again):
        batches, first = first_samples(again, Program(canonical).inputs, samples)
        if not first:
            raise CalibrationError(
                "sensitivity needs calibration samples: a model's errors depend on its inputs"
            )
        if trained is None:
            canonical = lift_above_zero(canonical)
        plan = calibrate(canonical, batches, config, progress) if trained is None else trained
        found = layer_effects(canonical, plan, first, config.max_error, progress)
    report = describe(canonical, plan, config, "", imported.notes)
    report.sensitivity = found
    return report
