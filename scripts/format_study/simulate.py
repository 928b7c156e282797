"""Post-training quantization of a network to any grid, simulated in float32.

The same for every format: weights rounded to nearest at the scale of the format's search, activations (of linear layers
and of products of two activations) by one scale per tensor, embedding tables per row, and the bias of each linear layer
corrected, layer after layer, by the mean error of what it really receives. Nonlinear layers are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import tvm

from format_study.formats import Format
from format_study.grids import Grid
from format_study.scales import Histogram, weight_scale
from tvm_qfp8.calibration.embeddings import quantized_embeddings
from tvm_qfp8.calibration.evaluate import Program, Step
from tvm_qfp8.calibration.linear import Linear, find_linear
from tvm_qfp8.calibration.operators import TABLE

TOKEN_MASK = "attention_mask"
Values = Mapping[str, Any]


class Network:
    """A canonical module, and the mean output of its linear layers in float32 on calibration samples."""

    def __init__(self, mod: tvm.IRModule, samples: Sequence[Mapping[str, np.ndarray]]) -> None:
        self.program, self.samples = Program(mod), samples
        found = find_linear(self.program)
        self.linear, self.products = found.linear, found.products
        self.tables = set(quantized_embeddings(self.program))
        self.last_reader = {name: step.name for step in self.program.steps for name in step.reads}
        self.compared = self._compared()
        self.kept = self.program.result_names() | {self.compared}
        self.means = {name: np.zeros(()) for name in self.linear}
        for sample in samples:
            self.run(sample, partial(self._observed, sample))

    def _compared(self) -> str:
        """The first result; where that is a softmax, its input: a single step of text that changes sides would
        outweigh all else in the SQNR of probabilities."""
        result = self.program.result
        first = result[0] if isinstance(result, tuple) else result
        made = {step.name: step for step in self.program.steps}
        step = made[first.name]
        while step.operator in ("alias", "relax.reshape") and step.arguments[0].name in made:
            step = made[step.arguments[0].name]
        return str(step.arguments[0].name if step.operator == "relax.nn.softmax" else first.name)

    def compare(
        self, inputs: Mapping[str, np.ndarray], value: Callable[[Step, Values], Any] | None = None
    ) -> np.ndarray:
        """What the SQNR is taken of for one input; logits less their mean, which no softmax sees."""
        values = self._values(inputs, value)
        found = np.asarray(values[self.compared])
        return (
            found if self.compared in self.program.result_names() else found - found.mean(-1, keepdims=True)
        )

    def _observed(self, sample: Values, step: Step, values: Values) -> Any:
        result = step.run(values)
        if step.name in self.linear:
            self.means[step.name] = self.means[step.name] + mean_output(
                self.linear[step.name], result, sample
            ) / len(self.samples)
        return result

    def run(
        self, inputs: Mapping[str, np.ndarray], value: Callable[[Step, Values], Any] | None = None
    ) -> list[np.ndarray]:
        """Results for one input; ``value(step, values)`` computes a step, by default in float32."""
        return self.program.outputs(self._values(inputs, value))

    def _values(
        self, inputs: Mapping[str, np.ndarray], value: Callable[[Step, Values], Any] | None
    ) -> dict[str, Any]:
        values: dict[str, Any] = dict(inputs)
        with np.errstate(all="ignore"):
            for step in self.program.steps:
                values[step.name] = value(step, values) if value else step.run(values)
                self.free(step, values)
        return values

    def free(self, step: Step, values: dict[str, Any]) -> None:
        """Drop what no later step reads."""
        for name in step.reads:
            if self.last_reader[name] == step.name and name not in self.kept:
                values.pop(name, None)


def valid_rows(rows: np.ndarray, sample: Values) -> np.ndarray:
    """Rows of valid tokens, if the sample has a mask with one element for each row; else all."""
    mask = np.asarray(sample.get(TOKEN_MASK, ())).reshape(-1) != 0
    return rows[mask] if mask.size == len(rows) and mask.any() else rows


def mean_output(linear: Linear, result: np.ndarray, sample: Values) -> np.ndarray:
    """Mean of each output channel of one sample, float64."""
    return valid_rows(linear.rows(result), sample).mean(axis=0, dtype=np.float64)


class RoundedWeights:
    """The weights and embedding tables of a network in one format, by variable name."""

    def __init__(self, network: Network, format_: Format) -> None:
        self.format = format_
        self.weights = {
            name: self._rounded(linear.weight, linear.weight_axis) for name, linear in network.linear.items()
        }
        self.tables = {
            step.name: self._rounded(step.arguments[0], 0)
            for step in network.program.steps
            if step.name in network.tables
        }

    def _rounded(self, weight: np.ndarray, axis: int) -> np.ndarray:
        moved = np.moveaxis(weight, axis, 0)
        rows = np.ascontiguousarray(moved).reshape(len(moved) if self.format.per_channel else 1, -1)
        best, least = rows, np.inf
        for grid in self.format.weights:
            found = grid.round(rows, weight_scale(rows, grid, self.format.search)[:, None])
            error = float(np.square(found - rows, dtype=np.float64).sum())
            if error < least:
                best, least = found, error
        return np.ascontiguousarray(np.moveaxis(best.reshape(moved.shape), 0, axis))


class Quantized:
    """A network in one format; ``run`` is like that of a compiled module."""

    def __init__(self, network: Network, rounded: RoundedWeights, activations: bool) -> None:
        self.network, self.format = network, rounded.format
        self.weights, self.tables = rounded.weights, rounded.tables
        self.activations: dict[str, tuple[Grid, float]] = {}
        self.corrections: dict[str, np.ndarray] = {}
        self._calibrate(activations)

    def _calibrate(self, activations: bool) -> None:
        network = self.network
        flows: list[dict[str, Any]] = [dict(sample) for sample in network.samples]
        with np.errstate(all="ignore"):
            for step in network.program.steps:
                if activations:
                    for source in self._sources(step):
                        self._observe(source, flows)
                for values in flows:
                    values[step.name] = self.value(step, values)
                if step.name in network.linear:
                    self._correct(network.linear[step.name], flows)
                for values in flows:
                    network.free(step, values)

    def _sources(self, step: Step) -> tuple[str, ...]:
        if step.name in self.network.linear:
            return (self.network.linear[step.name].source,)
        return self.network.products[step.name].sources if step.name in self.network.products else ()

    def _observe(self, name: str, flows: list[dict[str, Any]]) -> None:
        if name in self.activations:
            return
        histogram = Histogram()
        for values, sample in zip(flows, self.network.samples, strict=True):
            histogram.add(valid_rows(values[name].reshape(-1, values[name].shape[-1]), sample))
        self.activations[name] = histogram.choose(self.format.activations, self.format.search)

    def _correct(self, linear: Linear, flows: list[dict[str, Any]]) -> None:
        name = linear.step.name
        found = sum(
            mean_output(linear, values[name], sample)
            for values, sample in zip(flows, self.network.samples, strict=True)
        )
        mean = found / len(flows) - self.network.means[name]
        self.corrections[name] = linear.per_channel(mean.astype(np.float32))
        for values in flows:
            values[name] = values[name] - self.corrections[name]

    def _read(self, name: str, values: Values) -> np.ndarray:
        if name not in self.activations:
            return np.asarray(values[name])
        grid, scale = self.activations[name]
        return grid.round(values[name], scale)

    def value(self, step: Step, values: Values) -> Any:
        """What a step gives in this format."""
        name = step.name
        if name in self.tables:
            return TABLE["relax.take"](step.attrs, self.tables[name], values[step.arguments[1].name])
        if name in self.network.products:
            product = self.network.products[name]
            return product.output(*(self._read(source, values) for source in product.sources))
        if name not in self.network.linear:
            return step.run(values)
        linear = self.network.linear[name]
        result = linear.output(self._read(linear.source, values), self.weights[name])
        return result - self.corrections[name] if name in self.corrections else result

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Results for one input."""
        return self.network.run(inputs, self.value)

    def compare(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """What the SQNR is taken of for one input."""
        return self.network.compare(inputs, self.value)
