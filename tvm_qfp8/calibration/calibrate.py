"""Calibration: float samples in, a QuantizationPlan out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm

from tvm_qfp8.calibration import small_values
from tvm_qfp8.calibration.activations import LAYOUTS, LINEAR_LAYOUTS
from tvm_qfp8.calibration.choose_activation import FLOAT32, ActivationChooser, Grade
from tvm_qfp8.calibration.embeddings import quantized_embeddings
from tvm_qfp8.calibration.evaluate import Program
from tvm_qfp8.calibration.grades import within_budget
from tvm_qfp8.calibration.linear import find_linear
from tvm_qfp8.calibration.losses import compare_grades
from tvm_qfp8.calibration.plan import QuantizationPlan
from tvm_qfp8.calibration.samples import Batches, first_samples
from tvm_qfp8.calibration.spill import Spill
from tvm_qfp8.calibration.sums import sums_as_codes
from tvm_qfp8.calibration.thresholds import METHODS
from tvm_qfp8.calibration.walk import Walk
from tvm_qfp8.calibration.without_samples import quantize_without_samples
from tvm_qfp8.config import Config
from tvm_qfp8.errors import CalibrationError
from tvm_qfp8.format import get_layout

FIRST_SAMPLES = 16
"""Held in memory to choose between all layouts and linear ones."""

Progress = Callable[[str, int, int], None]
TOKEN_MASK = "attention_mask"


def walk_options(config: Config) -> dict[str, Any]:
    """What a configuration says about activations and tables, for ``Walk``.

    Raises
    ------
    CalibrationError
        The method is not known, decibels are negative, or no kernel computes the layout.
    InputError
        There is no such layout.
    """
    if config.byte_loss_db is not None and not config.byte_loss_db >= 0:
        raise CalibrationError(f"byte_loss_db is {config.byte_loss_db}; give decibels from 0, or None")
    if config.method not in METHODS:
        raise CalibrationError(f"method {config.method!r} is not known; use one of {', '.join(METHODS)}")
    auto = config.activations == "auto"
    if not auto and config.activations != FLOAT32:
        _check_computed(config.activations)
    layouts = LAYOUTS if auto else () if config.activations == FLOAT32 else (config.activations,)
    return {
        "chooser": ActivationChooser(layouts, config.method, own_scales=auto),
        "max_error": config.max_error,
    }


def _check_computed(layout: str) -> None:
    """Kernels hold grid values as int16."""
    if get_layout(layout).max_grid > np.iinfo(np.int16).max:
        computed = ", ".join((*LAYOUTS, *LINEAR_LAYOUTS))
        raise CalibrationError(
            f"activations are {layout}, which is for comparisons only; use {computed}, or auto or float32"
        )


def calibrate(
    mod: tvm.IRModule,
    batches: Batches | None,
    config: Config | None = None,
    progress: Progress | None = None,
    *,
    token_mask: str = TOKEN_MASK,
    spill_folder: str | None = None,
) -> QuantizationPlan:
    """Choose layouts, scales and bias corrections of all linear operators.

    Parameters
    ----------
    mod : IRModule
        In canonical form: one static ``main`` of Relax operators, constants bound.
    batches : iterable of {input name: array}, or one such dict, or path of an .npz, or None
        Consumed once, so a generator will do. An array has its input's shape; where all arrays of a dict
        have k times the first dimension they count as k samples. None: what needs no data
        (see ``without_samples``).
    config : Config
        ``skip`` holds variables or operators (names or shell patterns) that stay float32, ``activations``
        the layouts that activations may get, ``method`` how their scales are found.
    progress : callable ``(stage, done, total)``
        Called after each linear operator.
    token_mask : str
        Name of an input that is nonzero where a token is valid. Where a tensor has one row for each of
        its elements, the other rows are left out of statistics. An input of that name need not exist.
    spill_folder : str
        Where the temporary folder is made (default: the system's); it holds a few of the largest tensors
        of all samples at a time.

    Raises
    ------
    CalibrationError
        The file cannot be read, there is no sample, or one misses an input or has a wrong shape, a wrong
        dtype or a value that is not finite; or ``config`` asks for what there is not.
    ModelError
        A weight is not finite, or the module is not in canonical form.
    """
    program = Program(mod)
    config = config or Config()
    options = walk_options(config)
    steps = find_linear(program, config.skip)
    small_values.keep_in_float32(program, steps)
    report = progress or (lambda stage, done, total: None)
    plan = QuantizationPlan(skipped=steps.skipped)
    plan.embeddings = quantized_embeddings(program, config.skip)
    count = len(steps.linear) + len(steps.recurrent)
    if batches is None:
        quantize_without_samples(
            program, steps, plan, config.activations, lambda: report("quantize", len(plan.linear), count)
        )
        return plan
    samples, first = first_samples(batches, program.inputs, FIRST_SAMPLES)
    with Spill(spill_folder) as spill, np.errstate(all="ignore"):
        grades: dict[str, Grade] = {}
        sums: set[str] = set()
        if config.activations == "auto" and first:
            compared = compare_grades(program, steps, first, options["chooser"], token_mask, progress)
            grades = within_budget(compared, config.byte_loss_db)
            sums = sums_as_codes(compared, grades, first, config.byte_loss_db)
        walk = Walk(program, steps, spill, plan, token_mask=token_mask, grades=grades, sums=sums, **options)
        plan.samples = walk.spill_inputs(samples or ())
        walk.run(lambda: report("calibrate", len(plan.linear), count))
    return plan
