"""Which tensors get cheaper layouts than their best: those where they cost the outputs little for the time they save.

Linear grid values are bytes, of which an instruction multiplies twice as many as of int16 values with VNNI (x86), three
times as many with Arm's dot products, and somewhat more without. Layouts of three exponent bits take two products each
on tile registers and on tensor cores, those of two one. Weights that are bytes need no decoding there, and no sums in
blocks, at two products of bytes for any activation (``product_time``). Cheaper layouts have fewer steps where it
matters, though, and how much that costs differs from tensor to tensor by a factor of a thousand. So the error of each
activation and the weights that it meets, in their best layouts and in cheaper ones, is compared at the module's
outputs, all else in float32; tensors are taken in the order of error for each multiply-add, up to a budget, and none
where that makes up little of the network. Where weights in bytes would save much of the time that is left, as in
transformers, they get a budget of their own. The choice does not look at the target: a module gives the same bits
everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tvm_qfp8.calibration.activations import Observer
from tvm_qfp8.calibration.choose_activation import ANY, BYTES, LINEAR, NARROW, ActivationChooser, Grade
from tvm_qfp8.calibration.evaluate import Program
from tvm_qfp8.calibration.linear import Linear, LinearSteps, quantized_weight, read_only_by_linears
from tvm_qfp8.calibration.plan import ActivationQuantization
from tvm_qfp8.calibration.product_time import MACS, product_time
from tvm_qfp8.calibration.propagate import Change, Compared, relative_energy, values_with
from tvm_qfp8.calibration.recurrent_layer import Recurrent
from tvm_qfp8.calibration.row_scales import can_have_row_scales
from tvm_qfp8.calibration.rows import KeptRows
from tvm_qfp8.quantize import QTensor

BYTE_LOSS_DB = 1.5
"""That cheaper layouts may cost of the outputs' signal to error (of a softmax the logits'), estimated by the sum of
what rounding each activation alone does to them."""

WEIGHT_LOSS_DB = 1.5
"""The same of weights in bytes, of all estimated error, where they save ``WEIGHT_SHARE`` of a call's time."""

WEIGHT_SHARE = 0.15
"""MiniLM saves more than this, MobileNetV2 less, which has more rows and shorter sums."""

ELEMENT_TIME = 0.03
"""Of what is written between the products, for each value, in the unit of ``product_time``: what is left of the times
of MobileNetV2, MiniLM and PP-OCR, 0.02 to 0.04."""

LEAST_DB = 12.0
"""Unless asked to, outputs of more estimated error lose nothing: long chains of layers, as in language models, have
none to spare."""

LEAST_SHARE = 0.25
"""Of the multiply-adds of all layers that might be served, all in linear layouts: less is not worth any error."""

COMPARED_SAMPLES = 4
"""Samples on which outputs are compared; scales are found on all."""

MOST_COMPARED = 160
"""Tensors times samples: each takes three passes over what follows the tensor."""


Readers = list[Linear] | Recurrent
"""The dense layers that read a tensor, or the layer that reads its own hidden state."""


@dataclass(frozen=True)
class _Rounding:
    """An activation as it may be rounded, and the weights that meet it then, by the layer's variable."""

    activation: ActivationQuantization | None
    weights: Mapping[str, QTensor]


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
        name: linears for name, linears in read_only_by_linears(found).items() if _macs(linears)
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
        self.means: dict[str, Any] = dict.fromkeys(readers, 0.0)
        """Of each channel, summed over the samples observed."""
        self.observed = 0
        self.rows = {name: KeptRows(observed) for name in readers}
        self.by_rows = {
            name
            for name, linears in readers.items()
            if isinstance(linears, list) and can_have_row_scales(linears)
        }
        """Where rows may have scales of their own, for which some are kept."""
        self.roundings: dict[tuple[str, Grade], _Rounding] = {}
        self.activation_alone = dict.fromkeys(readers, 0.0)
        self.samples = 0
        self.lost = {grade: dict.fromkeys(readers, 0.0) for grade in (ANY, NARROW, BYTES, LINEAR)}

    def observe(self, sample: Mapping[str, np.ndarray]) -> None:
        """Statistics of one sample's tensors."""
        values, mask = dict(sample), sample.get(self.token_mask)

        def record(name: str) -> None:
            if name in self.observers:
                rows = _valid_rows(_read(self.readers[name], name, values), mask)
                self.observers[name].record(rows)
                if name in self.by_rows:
                    self.rows[name].add(rows)
                self.means[name] = self.means[name] + rows.mean(axis=0)

        self.observed += 1
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

        def lost_by(changes: Mapping[str, Change]) -> float:
            found = self.compared.values(values_with(self.program, changes, values, wanted))
            return relative_energy([a - b for a, b in zip(found, exact, strict=True)], exact, mask)

        return values, lost_by

    def add(self, sample: Mapping[str, np.ndarray]) -> Iterator[int]:
        """Compare outputs on one sample, after all were observed; yields how many tensors are done."""
        self.samples += 1
        values, lost_by = self.in_float32(sample)

        def lost(name: str, rounding: _Rounding) -> float:
            changes = _changes(self.readers[name], values, rounding, self.means[name] / self.observed)
            return np.inf if changes is None else lost_by(changes)

        for count, name in enumerate(self.readers, 1):
            best = self._rounding(name, ANY)
            self.activation_alone[name] += lost(name, replace(best, weights={}))
            best_lost = lost(name, best)
            self.lost[ANY][name] += best_lost
            is_narrow = best.activation is not None and best.activation.layout in NARROW.activations
            self.lost[NARROW][name] += best_lost if is_narrow else lost(name, self._rounding(name, NARROW))
            for grade in (BYTES, LINEAR):
                self.lost[grade][name] += lost(name, self._rounding(name, grade))
            yield count

    def _rounding(self, name: str, grade: Grade) -> _Rounding:
        if (name, grade) not in self.roundings:
            readers, observer = self.readers[name], self.observers[name]
            if isinstance(readers, Recurrent):
                choice = self.chooser.choose(observer, [], self.rows[name], grade)
                weights = {name: quantized_weight(readers, grade.weights)}
            else:
                choice = self.chooser.choose(observer, readers, self.rows[name], grade)
                weights = _weights(readers, choice.activation, grade.weights)
            self.roundings[name, grade] = _Rounding(choice.activation, weights)
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

    def within_budget(self, byte_loss_db: float | None) -> dict[str, Grade]:
        """The tensors that get cheaper layouts: those of least loss for each multiply-add that is saved.

        Parameters
        ----------
        byte_loss_db : float or None
            As in ``Config``.
        """
        alone = self.of_activations()
        if byte_loss_db is None:
            most = min(alone * 10 ** (BYTE_LOSS_DB / 10), self.samples * 10 ** (-LEAST_DB / 10))
        else:
            most = alone * 10 ** (byte_loss_db / 10)
        budget = max(most - alone, 0.0)
        free = {name: LINEAR for name in self.readers if self._loss(name, LINEAR) == 0}
        chosen = self._bought(free, budget, (NARROW, LINEAR), self._cost)
        saved = sum(self._cost(name, ANY) - self._cost(name, grade) for name, grade in chosen.items())
        if saved < LEAST_SHARE * sum(map(_macs, self.readers.values())):
            chosen = free
        return chosen if byte_loss_db is not None else self._with_weights_in_bytes(chosen)

    def _with_weights_in_bytes(self, chosen: dict[str, Grade]) -> dict[str, Grade]:
        """The same with more weights in bytes, if much of the time is decoding and adding up others."""
        error = self.error(chosen)
        most = min(error * 10 ** (WEIGHT_LOSS_DB / 10), self.samples * 10 ** (-LEAST_DB / 10))
        more = self._bought(chosen, most - error, (BYTES,), self._time)
        now, then = (
            sum(self._time(name, grades.get(name, ANY)) for name in self.readers) for grades in (chosen, more)
        )
        written = sum(math.prod(getattr(step.spec, "shape", ())) for step in self.program.steps)
        if now - then < WEIGHT_SHARE * (now + ELEMENT_TIME * written):
            return chosen
        return self._bought(chosen, most - error, (BYTES, LINEAR), self._time)

    def _bought(
        self,
        chosen: Mapping[str, Grade],
        budget: float,
        grades: Sequence[Grade],
        cost: Callable[[str, Grade], float],
    ) -> dict[str, Grade]:
        """What is chosen, and what a budget of errors buys: what costs the least error for what it saves first."""
        bought = dict(chosen)
        while budget > 0 and (moves := list(self._moves(bought, budget, grades, cost))):
            _, loss, name, grade = min(moves, key=lambda move: move[0])
            budget -= loss
            bought[name] = grade
        return bought

    def _moves(
        self,
        chosen: Mapping[str, Grade],
        budget: float,
        grades: Sequence[Grade],
        cost: Callable[[str, Grade], float],
    ) -> Iterator[tuple[float, float, str, Grade]]:
        """What may come next: loss for what it saves, loss, tensor and grade."""
        for name in self.readers:
            now = chosen.get(name, ANY)
            for grade in grades:
                saved, loss = (
                    cost(name, now) - cost(name, grade),
                    self._loss(name, grade) - self._loss(name, now),
                )
                if saved > 0 and loss <= budget:  # never for what is infinite or no number
                    yield loss / saved, loss, name, grade

    def _cost(self, name: str, grade: Grade) -> float:
        """Of the multiply-adds by the layouts alone."""
        best = self.roundings[name, ANY].activation
        is_narrow = grade is ANY and best is not None and best.layout in NARROW.activations
        return _macs(self.readers[name]) * (NARROW if is_narrow else grade).cost

    def _time(self, name: str, grade: Grade) -> float:
        """Of all that reads a variable; 0 where it is not rounded."""
        readers, rounding = self.readers[name], self.roundings.get((name, grade))
        if rounding is None:  # what is narrow anyway
            return self._time(name, ANY)
        if rounding.activation is None:
            return 0.0
        layout = rounding.activation.layout
        if isinstance(readers, Recurrent):
            return readers.macs / MACS * (1 if layout in LINEAR.activations else 2)
        return sum(
            product_time(linear, layout, rounding.weights[linear.step.name].layout)
            for linear in readers
            if linear.macs and not linear.is_depthwise
        )

    def _loss(self, name: str, grade: Grade) -> float:
        return max(self.lost[grade][name] - self.lost[ANY][name], 0.0)


def _macs(readers: Readers) -> int:
    """Multiply-adds that take time by the layouts."""
    if isinstance(readers, Recurrent):
        return readers.macs
    return sum(linear.macs for linear in readers if not linear.is_depthwise)


def _read(readers: Readers, name: str, values: Mapping[str, Any]) -> np.ndarray:
    """What is rounded."""
    if isinstance(readers, Recurrent):
        _, operands = readers.observed([values])
        return np.concatenate([x for _, x in operands])
    return values[name]


def _valid_rows(value: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    rows = value.reshape(-1, value.shape[-1])
    return rows[mask.reshape(-1) != 0] if mask is not None and mask.size == len(rows) and mask.any() else rows


def _weights(
    linears: Sequence[Linear], activation: ActivationQuantization | None, layouts: Sequence[str]
) -> dict[str, QTensor]:
    if activation is None:
        return {}
    return {
        linear.step.name: quantized_weight(linear.meeting(activation), layouts)
        for linear in linears
        if not linear.is_depthwise
    }


def _changes(
    readers: Readers, values: Mapping[str, Any], rounding: _Rounding, mean: np.ndarray
) -> Mapping[str, Change] | None:
    """What the readers give with a tensor and the weights that meet it rounded; None where no layout holds it.

    Less what rounding the weights does to the ``mean`` activation: the bias makes up for it.
    """
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
        found = linear.output(rounded, met)
        shift = _shift(linear.meeting(activation), met, activation.prepared(mean))
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
