"""Calibration: float samples in, a QuantizationPlan out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tvm

from tvm_qfp8.calibration.activations import LAYOUTS
from tvm_qfp8.calibration.embeddings import quantized_embeddings
from tvm_qfp8.calibration.evaluate import Program
from tvm_qfp8.calibration.linear import Linear, Product, find_linear
from tvm_qfp8.calibration.plan import LinearQuantization, QuantizationPlan
from tvm_qfp8.calibration.samples import Batches
from tvm_qfp8.calibration.spill import Spill
from tvm_qfp8.calibration.thresholds import METHODS
from tvm_qfp8.calibration.walk import Walk, quantized_weight
from tvm_qfp8.config import Config
from tvm_qfp8.errors import CalibrationError

Progress = Callable[[str, int, int], None]


def calibrate(
    mod: tvm.IRModule,
    batches: Batches | None,
    config: Config | None = None,
    progress: Progress | None = None,
    *,
    token_mask: str = "attention_mask",
    spill_folder: str | None = None,
) -> QuantizationPlan:
    """Choose layouts, scales and bias corrections of all linear operators.

    Parameters
    ----------
    mod : IRModule
        In canonical form: one static ``main`` of Relax operators, constants bound.
    batches : iterable of {input name: array}, or one such dict, or path of an .npz, or None
        Consumed once, so a generator will do. An array has its input's shape; where all arrays of a dict
        have k times the first dimension they count as k samples. None: weights only, no correction.
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
        dtype or a value that is not finite; or the method is not known.
    ModelError
        A weight is not finite, or the module is not in canonical form.
    """
    program = Program(mod)
    config = config or Config()
    if config.method not in METHODS:
        raise CalibrationError(f"method {config.method!r} is not known; use one of {', '.join(METHODS)}")
    layouts = LAYOUTS if config.activations == "auto" else (config.activations,)
    steps = find_linear(program, config.skip)
    report = progress or (lambda stage, done, total: None)
    plan = QuantizationPlan(skipped=steps.skipped)
    plan.embeddings = quantized_embeddings(program, config.skip)
    if batches is None:
        plan.skipped.update(dict.fromkeys(steps.products, "no calibration data"))
        for done, (name, linear) in enumerate(steps.linear.items(), 1):
            plan.linear[name] = LinearQuantization(quantized_weight(linear))
            report("quantize weights", done, len(steps.linear))
        return plan
    with Spill(spill_folder) as spill, np.errstate(all="ignore"):
        walk = Walk(
            program,
            steps,
            spill,
            plan,
            layouts=layouts,
            method=config.method,
            token_mask=token_mask,
            max_error=config.max_error,
            in_bytes=config.activations == "auto",
        )
        plan.samples = walk.spill_inputs(batches)
        for group in walk.groups():
            if isinstance(group, Linear):
                walk.run_linear(group)
                report("calibrate", len(plan.linear), len(steps.linear))
            elif isinstance(group, Product):
                walk.run_product(group)
            else:
                walk.run_block(group)
            walk.free_dead(group)
    return plan
