"""Which layer costs how much: each quantized alone, all others in float32, seen at the module's outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm

from tvm_qfp8.calibration.evaluate import Step
from tvm_qfp8.calibration.plan import QuantizationPlan
from tvm_qfp8.calibration.propagate import energy, values_with
from tvm_qfp8.calibration.quantized import QuantizedProgram
from tvm_qfp8.calibration.recurrent_layer import RECURRENT
from tvm_qfp8.layer_effect import LayerEffect

INFINITE_DB = 200.0
"""Stands for no error at all."""


def layer_effects(
    mod: tvm.IRModule,
    plan: QuantizationPlan,
    samples: Sequence[Mapping[str, np.ndarray]],
    max_error: float = 1e-3,
    progress: Callable[[str, int, int], None] | None = None,
    token_mask: str = "attention_mask",
) -> list[LayerEffect]:
    """The quantized layers of a plan, the most harmful first.

    Parameters
    ----------
    mod : IRModule
        In canonical form.
    plan : QuantizationPlan
        Of ``calibrate``.
    samples : sequence of {input name: array}
        A few are enough. Only what a layer's error reaches is computed again, once per layer and sample.
    token_mask : str
        Name of an input that is nonzero where a token is valid: other rows of outputs do not count.
    """
    program = QuantizedProgram(mod, plan, max_error)
    steps = program.program.steps
    names = [step.name for step in steps if program.is_quantized(step.name)]
    errors = dict.fromkeys(names, 0.0)
    signal = 0.0
    report = progress or (lambda stage, done, total: None)
    wanted = program.program.result_names()
    for index, sample in enumerate(samples):
        values: dict[str, Any] = dict(sample)
        with np.errstate(all="ignore"):
            for step in steps:
                values[step.name] = step.run(values)
            outputs = program.program.outputs(values)
            mask = sample.get(token_mask)
            signal += energy(outputs, mask)
            for done, name in enumerate(names, 1):
                seen = values_with(program.program, {name: program.value}, values, wanted)
                found = program.program.outputs(seen)
                errors[name] += energy([a - b for a, b in zip(found, outputs, strict=True)], mask)
                report("sensitivity", index * len(names) + done, len(samples) * len(names))
    operators = {step.name: _operator(step) for step in steps}
    own = {name: chosen.sqnr_db for name, chosen in plan.linear.items()}
    effects = [LayerEffect(n, operators[n], own.get(n), decibel(signal, errors[n])) for n in names]
    return sorted(effects, key=lambda effect: effect.output_sqnr_db)


def _operator(step: Step) -> str:
    """As reports call it."""
    return step.attrs.kind.lower() if step.operator == RECURRENT else step.operator.removeprefix("relax.")


def decibel(signal: float, error: float) -> float:
    """Signal to error, finite."""
    if signal == 0.0 or error == 0.0:
        return -INFINITE_DB if error else INFINITE_DB
    return min(INFINITE_DB, 10 * float(np.log10(signal / error)))
