"""What the outputs lose by the rounding of each tensor and of the weights that meet it, all else in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tvm_qfp8.calibration.activations import Observer
from tvm_qfp8.calibration.choose_activation import (
    ANY,
    BYTES,
    LINEAR,
    LINEAR_PIXELS,
    NARROW,
    ActivationChooser,
    Grade,
)
from tvm_qfp8.calibration.evaluate import Program
from tvm_qfp8.calibration.linear import Linear, LinearSteps, quantized_weight, read_only_by_linears
from tvm_qfp8.calibration.plan import ActivationQuantization
from tvm_qfp8.calibration.propagate import Change, Compared, relative_energy, values_with
from tvm_qfp8.calibration.recurrent_layer import Recurrent
from tvm_qfp8.calibration.row_scales import can_have_row_scales
from tvm_qfp8.calibration.rows import KeptRows
from tvm_qfp8.quantize import QTensor

COMPARED_SAMPLES = 4
"""Samples on which outputs are compared; scales are found on all."""

MOST_COMPARED = 160
"""Tensors times samples: each takes four to six passes over what follows the tensor."""

Readers = list[Linear] | Recurrent
"""The dense layers that read a tensor, or the layer that reads its own hidden state."""


@dataclass(frozen=True)
class Rounding:
    """An activation as it may be rounded, and the weights that meet it then, by the layer's variable.

    ``shifts`` is what rounding the weights adds to the layers' mean outputs: the bias makes up for it.
    """

    activation: ActivationQuantization | None
    weights: Mapping[str, QTensor]
    shifts: Mapping[str, np.ndarray] = field(default_factory=dict)


def compare_grades(
    program: Program,
    found: LinearSteps,
    samples: Sequence[Mapping[str, np.ndarray]],
    chooser: ActivationChooser | None = None,
    token_mask: str = "attention_mask",
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """What the outputs lose where variables, and the weights of the dense layers that read them, get other layouts.

    A recurrent layer's own name stands for its hidden state.

    Parameters
    ----------
    program : Program
        In canonical form.
    found : LinearSteps
        What is quantized in it.
    samples : sequence of {input name: array}
        As many as scales need; outputs are compared on the first ones.
    chooser : ActivationChooser
    token_mask : str
        As in ``calibrate``.
    """
    report = progress or (lambda stage, done, total: None)
    readers: dict[str, Readers] = {
        name: linears for name, linears in read_only_by_linears(found).items() if macs_of(linears)
    }
    readers |= found.recurrent
    compared = Comparison(program, readers, chooser or ActivationChooser(), token_mask, len(samples))
    with np.errstate(all="ignore"):
        for sample in samples:
            compared.observe(sample)
        few = compared.few(samples)
        for index, sample in enumerate(few):
            for done in compared.add(sample):
                report("choose layouts", index * len(readers) + done, len(few) * len(readers))
    return compared


class Comparison:
    """What the outputs lose by each tensor's rounding, summed over samples."""

    def __init__(
        self,
        program: Program,
        readers: Mapping[str, Readers],
        chooser: ActivationChooser,
        token_mask: str,
        observed: int,
    ) -> None:
        self.program, self.readers = program, readers
        self.chooser, self.token_mask, self.compared = chooser, token_mask, Compared(program)
        self.observers = {name: Observer() for name in readers}
        self.sizes = dict.fromkeys(readers, 0)
        """Values of each tensor."""
        self.means: dict[str, Any] = dict.fromkeys(readers, 0.0)
        """Of each channel, summed over the samples observed."""
        self.observed = observed
        dense = {name: linears for name, linears in readers.items() if isinstance(linears, list)}
        self.rows = {
            name: KeptRows(observed)
            for name, linears in dense.items()
            if can_have_row_scales(linears, by_pixel=True)
        }
        """Where rows may have scales of their own, or pixels."""
        self.pixels = {name for name in self.rows if not can_have_row_scales(dense[name])}
        """Where 1x1 convolutions read them."""
        self.roundings: dict[tuple[str, Grade], Rounding] = {}
        self.activation_alone = dict.fromkeys(readers, 0.0)
        self.samples = 0
        self.spread = 1.0
        """Least share of an output's energy that lies in differences of its values, not in their mean."""
        self.lost = {
            grade: dict.fromkeys(readers, 0.0) for grade in (ANY, NARROW, BYTES, LINEAR_PIXELS, LINEAR)
        }

    def observe(self, sample: Mapping[str, np.ndarray]) -> None:
        """Statistics of one sample's tensors."""
        values, mask = dict(sample), sample.get(self.token_mask)

        def record(name: str) -> None:
            if name in self.observers:
                rows = _valid_rows(_read(self.readers[name], name, values), mask)
                self.observers[name].record(rows)
                self.sizes[name] = rows.size
                if name in self.rows:
                    self.rows[name].add(rows)
                self.means[name] = self.means[name] + rows.mean(axis=0)

        for name in sample:
            record(name)
        for step in self.program.steps:
            values[step.name] = step.run(values)
            record(step.name)
            for name in self.program.last_reads[step.name]:
                del values[name]

    def few(self, samples: Sequence[Mapping[str, np.ndarray]]) -> Sequence[Mapping[str, np.ndarray]]:
        """The samples on which outputs are compared."""
        return samples[: min(COMPARED_SAMPLES, max(1, MOST_COMPARED // max(len(self.readers), 1)))]

    def in_float32(self, sample: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], Callable[..., float]]:
        """All values on one sample, and what changed steps (``propagate.Change``) lose of the outputs."""
        values: dict[str, Any] = dict(sample)
        for step in self.program.steps:
            values[step.name] = step.run(values)
        mask, wanted = sample.get(self.token_mask), self.compared.names
        exact = self.compared.values(values)
        self.spread = min([self.spread, *map(_spread, exact)])

        def lost_by(changes: Mapping[str, Change]) -> float:
            found = self.compared.values(values_with(self.program, changes, values, wanted))
            return relative_energy([a - b for a, b in zip(found, exact, strict=True)], exact, mask)

        return values, lost_by

    def add(self, sample: Mapping[str, np.ndarray]) -> Iterator[int]:
        """Compare outputs on one sample, after all were observed; yields how many tensors are done."""
        self.samples += 1
        values, lost_by = self.in_float32(sample)

        def lost(name: str, rounding: Rounding) -> float:
            changes = _changes(self.readers[name], values, rounding)
            return np.inf if changes is None else lost_by(changes)

        for count, name in enumerate(self.readers, 1):
            best = self._rounding(name, ANY)
            self.activation_alone[name] += lost(name, replace(best, weights={}, shifts={}))
            best_lost = lost(name, best)
            self.lost[ANY][name] += best_lost
            is_narrow = best.activation is not None and best.activation.layout in NARROW.activations
            self.lost[NARROW][name] += best_lost if is_narrow else lost(name, self._rounding(name, NARROW))
            for grade in (BYTES, LINEAR):
                self.lost[grade][name] += lost(name, self._rounding(name, grade))
            of_pixels = self._rounding(name, LINEAR_PIXELS) if name in self.pixels else Rounding(None, {})
            self.lost[LINEAR_PIXELS][name] += lost(name, of_pixels)
            yield count

    def _rounding(self, name: str, grade: Grade) -> Rounding:
        if (name, grade) not in self.roundings:
            readers, observer = self.readers[name], self.observers[name]
            rows = self.rows.get(name, KeptRows(self.observed))
            if isinstance(readers, Recurrent):
                choice = self.chooser.choose(observer, [], rows, grade)
                rounding = Rounding(choice.activation, {name: quantized_weight(readers, grade.weights)})
            else:
                choice = self.chooser.choose(observer, readers, rows, grade)
                mean = self.means[name] / self.observed
                rounding = _with_weights(readers, choice.activation, grade.weights, mean)
            self.roundings[name, grade] = rounding
        return self.roundings[name, grade]

    def activation(self, name: str, grade: Grade) -> ActivationQuantization | None:
        """How a variable is rounded in a grade."""
        return self.roundings[name, grade].activation

    def error(self, chosen: Mapping[str, Grade]) -> float:
        """Estimated error of the outputs over their energy, summed over samples; all weights rounded to nearest."""
        lost = (self.lost[chosen.get(name, ANY)][name] for name in self.readers)
        return sum(one for one in lost if np.isfinite(one))

    def of_activations(self) -> float:
        """The same of activations in their best layouts, with exact weights."""
        return sum(lost for lost in self.activation_alone.values() if np.isfinite(lost))

    def loss(self, name: str, grade: Grade) -> float:
        """What the outputs lose more than with a variable in its best layouts."""
        return max(self.lost[grade][name] - self.lost[ANY][name], 0.0)


def macs_of(readers: Readers) -> int:
    """Multiply-adds that take time by the layouts."""
    if isinstance(readers, Recurrent):
        return readers.macs
    return sum(linear.macs for linear in readers if not linear.is_depthwise)


def _spread(values: np.ndarray) -> float:
    energy = np.square(values, dtype=np.float64).sum()
    return float(np.var(values, dtype=np.float64) * values.size / energy) if 0 < energy < np.inf else 0.0


def _read(readers: Readers, name: str, values: Mapping[str, Any]) -> np.ndarray:
    """What is rounded."""
    if isinstance(readers, Recurrent):
        _, operands = readers.observed([values])
        return np.concatenate([x for _, x in operands])
    return values[name]


def _valid_rows(value: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    rows = value.reshape(-1, value.shape[-1])
    return rows[mask.reshape(-1) != 0] if mask is not None and mask.size == len(rows) and mask.any() else rows


def _with_weights(
    linears: Sequence[Linear],
    activation: ActivationQuantization | None,
    layouts: Sequence[str],
    mean: np.ndarray,
) -> Rounding:
    """With the weights that meet an activation, whose ``mean`` is that of its channels."""
    weights: dict[str, QTensor] = {}
    shifts: dict[str, np.ndarray] = {}
    if activation is None:
        return Rounding(None, weights)
    for linear in linears:
        if linear.is_depthwise:
            continue
        meeting = linear.meeting(activation)
        weight = weights[linear.step.name] = quantized_weight(meeting, layouts)
        shift = _shift(meeting, weight.dequantize(), activation.prepared(mean))
        if shift is not None:
            shifts[linear.step.name] = shift
    return Rounding(activation, weights, shifts)


def _changes(readers: Readers, values: Mapping[str, Any], rounding: Rounding) -> Mapping[str, Change] | None:
    """What the readers give with a tensor and the weights that meet it rounded; None where no layout holds it."""
    activation = rounding.activation
    if activation is None:
        return None
    if isinstance(readers, Recurrent):
        return _with_rounded_state(readers, activation, rounding.weights)
    linears = readers
    rounded = activation.rounded(values[linears[0].source])
    by_name = {linear.step.name: linear for linear in linears}

    def change(step, _seen):
        linear, weight = by_name[step.name], rounding.weights.get(step.name)
        met = linear.meeting(activation).weight if weight is None else weight.dequantize()
        found, shift = linear.output(rounded, met), rounding.shifts.get(step.name)
        return found if shift is None else found - linear.per_channel(shift)

    return dict.fromkeys(by_name, change)


def _shift(linear: Linear, rounded: np.ndarray, mean: np.ndarray) -> np.ndarray | None:
    """What a rounded weight adds to the layer's mean output, ``(out_channels,)``, borders apart.

    None for transposed convolutions.
    """
    off = rounded - linear.weight
    if linear.step.operator == "relax.matmul":
        return mean @ off
    if linear.step.operator != "relax.nn.conv2d":
        return None
    of_groups = mean.reshape(int(linear.step.attrs.groups), -1)
    outputs = off.sum(axis=(1, 2)).reshape(len(of_groups), -1, of_groups.shape[1])
    return np.einsum("goi,gi->go", outputs, of_groups).reshape(-1)


def _with_rounded_state(
    layer: Recurrent, activation: ActivationQuantization, weights: Mapping[str, QTensor]
) -> Mapping[str, Change]:
    """What a recurrent layer gives with its hidden state and its weight rounded."""
    name = layer.step.name
    weight = weights[name].dequantize() if name in weights else layer.weight

    def change(_step, seen):
        return layer.rounded_outputs([seen], activation, weight)[0]

    return {name: change}
