"""Which layer costs how much: each quantized alone, all others in float32, seen at the module's outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm

from tvm_qfp8.calibration.plan import QuantizationPlan
from tvm_qfp8.calibration.quantized import QuantizedProgram

INFINITE_DB = 200.0
"""Stands for no error at all."""


@dataclass(frozen=True)
class LayerEffect:
    """A quantized layer (linear, product of two activations, or embedding) and what it does to the outputs."""

    layer: str
    operator: str
    sqnr_db: float | None
    """Signal to error of its own output with all earlier layers quantized, from calibration."""
    output_sqnr_db: float
    """Signal to error of the module's outputs with this layer alone quantized."""


def layer_effects(
    mod: tvm.IRModule,
    plan: QuantizationPlan,
    samples: Sequence[Mapping[str, np.ndarray]],
    max_error: float = 1e-3,
    progress: Callable[[str, int, int], None] | None = None,
    names: Collection[str] | None = None,
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
    names : collection of str
        Layers to look at; None: all.
    """
    program = QuantizedProgram(mod, plan, max_error)
    steps = program.program.steps
    names = [s.name for s in steps if program.is_quantized(s.name) and (names is None or s.name in names)]
    errors = dict.fromkeys(names, 0.0)
    signal = 0.0
    report = progress or (lambda stage, done, total: None)
    for index, sample in enumerate(samples):
        values: dict[str, Any] = dict(sample)
        with np.errstate(all="ignore"):
            for step in steps:
                values[step.name] = step.run(values)
            outputs = program.program.outputs(values)
            signal += _energy(outputs)
            for done, name in enumerate(names, 1):
                found = _outputs_with(program, name, values)
                errors[name] += _energy([a - b for a, b in zip(found, outputs, strict=True)])
                report("sensitivity", index * len(names) + done, len(samples) * len(names))
    operators = {step.name: step.operator.removeprefix("relax.") for step in steps}
    own = {name: chosen.sqnr_db for name, chosen in plan.linear.items()}
    effects = [LayerEffect(n, operators[n], own.get(n), _decibel(signal, errors[n])) for n in names]
    return sorted(effects, key=lambda effect: effect.output_sqnr_db)


def _outputs_with(program: QuantizedProgram, name: str, values: Mapping[str, Any]) -> list[np.ndarray]:
    """The outputs with one layer quantized; ``values`` are those of the float32 program."""
    changed: dict[str, Any] = {}
    seen = _Overlay(changed, values)
    for step in program.program.steps:
        if step.name == name:
            changed[name] = program.value(step, seen)
        elif any(read in changed for read in step.reads):
            changed[step.name] = step.run(seen)
    return program.program.outputs(seen)


class _Overlay(Mapping[str, Any]):
    """Changed values before the original ones."""

    def __init__(self, changed: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        self._changed, self._values = changed, values

    def __getitem__(self, name: str) -> Any:
        return self._changed[name] if name in self._changed else self._values[name]

    def __iter__(self):
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _energy(arrays: Sequence[np.ndarray]) -> float:
    return sum(
        float(np.sum(np.square(array, dtype=np.float64))) for array in arrays if array.dtype.kind == "f"
    )


def _decibel(signal: float, error: float) -> float:
    return INFINITE_DB if error == 0.0 else min(INFINITE_DB, 10 * float(np.log10(signal / error)))
