"""Post-training quantization of a network to any grid, simulated in float32.

The same for every format, as `compile` does for QFP8: scales by the format's search, activations (of linear layers
and of products of two activations) by one scale per tensor, those of dense layers on request also divided by the
largest magnitude of their row, found at run time; embedding tables per row; then, layer after layer, weights
rounded on data (tvm_qfp8/calibration/rounding.py) and biases corrected, by what the layer really receives. Of several
grids the weights take the one of least output error. Matrices of large networks are rounded without compensation
(`large`). Nonlinear layers are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import tvm

from format_study.formats import Format
from format_study.grids import Grid
from format_study.large import Received
from format_study.scales import SMALLEST, Histogram, weight_scale
from tvm_qfp8.calibration.embeddings import quantized_embeddings
from tvm_qfp8.calibration.evaluate import Program, Step
from tvm_qfp8.calibration.input_rows import InputRows, as_rows, from_rows
from tvm_qfp8.calibration.linear import Linear, find_linear
from tvm_qfp8.calibration.operators import TABLE
from tvm_qfp8.calibration.output_error import row_weights
from tvm_qfp8.calibration.rounding import RoundedRows, can_round, least_output_error

TOKEN_MASK = "attention_mask"
LARGE = 10**8
"""So many weights make a network large."""

Values = Mapping[str, Any]
Flows = Sequence[dict[str, Any]]
"""What a sample has become so far, one dict each."""


class Network:
    """A canonical module with its linear layers, and samples to calibrate it on."""

    def __init__(self, mod: tvm.IRModule, samples: Sequence[Mapping[str, np.ndarray]]) -> None:
        self.program, self.samples = Program(mod), samples
        found = find_linear(self.program)
        self.linear, self.products = found.linear, found.products
        self.tables = set(quantized_embeddings(self.program))
        dense = (linear for linear in self.linear.values() if linear.step.operator == "relax.matmul")
        self.row_sources = {linear.source for linear in dense}
        self.last_reader = {name: step.name for step in self.program.steps for name in step.reads}
        self.compared = self._compared()
        self.compares_result = self.compared in self.program.result_names()
        self.kept = self.program.result_names() | {self.compared}
        self.is_large = sum(linear.weight.size for linear in self.linear.values()) >= LARGE

    @cached_property
    def exact(self) -> tuple[dict[str, list[np.ndarray]], dict[str, np.ndarray]]:
        """In float32: what linear layers read, of every sample, and the sum of the samples' mean outputs."""
        flows: Flows = [dict(sample) for sample in self.samples]
        inputs, sums = {}, {}
        with np.errstate(all="ignore"):
            for step in self.program.steps:
                if step.name in self.linear:
                    source = self.linear[step.name].source
                    inputs[source] = [values[source] for values in flows]
                for values in flows:
                    values[step.name] = step.run(values)
                if step.name in self.linear:
                    sums[step.name] = summed_means(self.linear[step.name], flows, self.samples)
                for values in flows:
                    self.free(step, values)
        return inputs, sums

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
        return found if self.compares_result else found - found.mean(-1, keepdims=True)

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


def valid_tokens(rows: int, sample: Values) -> np.ndarray | None:
    """Which of ``rows`` belong to valid tokens, if the sample has a mask with one element for each; else None."""
    mask = np.asarray(sample.get(TOKEN_MASK, ())).reshape(-1) != 0
    return mask if mask.size == rows and mask.any() else None


def valid_rows(rows: np.ndarray, sample: Values) -> np.ndarray:
    """Rows of valid tokens; all where there is no mask."""
    mask = valid_tokens(len(rows), sample)
    return rows if mask is None else rows[mask]


def mean_output(linear: Linear, result: np.ndarray, sample: Values) -> np.ndarray:
    """Mean of each output channel of one sample, float64."""
    return valid_rows(linear.rows(result), sample).mean(axis=0, dtype=np.float64)


def summed_means(linear: Linear, flows: Flows, samples: Sequence[Values]) -> np.ndarray:
    """Of each output channel, the sum of the samples' means."""
    means = (
        mean_output(linear, values[linear.step.name], sample)
        for values, sample in zip(flows, samples, strict=True)
    )
    return np.asarray(sum(means))


class NearestWeights:
    """The weights of linear layers on each grid of a format, and the embedding tables, rounded to nearest."""

    def __init__(self, network: Network, format_: Format) -> None:
        self.format = format_
        self.weights = {name: self._each_grid(linear) for name, linear in network.linear.items()}
        self.tables = {
            step.name: self._least(step.arguments[0])
            for step in network.program.steps
            if step.name in network.tables
        }

    def _each_grid(self, linear: Linear) -> list[RoundedRows]:
        rows = as_rows(linear, linear.weight)
        return [self._rounded(rows, grid) for grid in self.format.weights]

    def _least(self, table: np.ndarray) -> np.ndarray:
        rounded = [self._rounded(table[None], grid).values[0] for grid in self.format.weights]
        return min(rounded, key=lambda found: float(np.square(found - table, dtype=np.float64).sum()))

    def _rounded(self, rows: np.ndarray, grid: Grid) -> RoundedRows:
        """``rows`` (groups, channels, values)."""
        groups, channels, depth = rows.shape
        flat = np.ascontiguousarray(rows).reshape(groups * channels if self.format.per_channel else 1, -1)
        scale = weight_scale(flat, grid, self.format.search).astype(np.float32)
        values = grid.round(flat, scale[:, None]).reshape(rows.shape)
        return RoundedRows(
            values, np.broadcast_to(scale, groups * channels).reshape(groups, channels), grid.round
        )


@dataclass(frozen=True)
class Mode:
    """What is quantized beside the weights: nothing, activations, those of dense layers with a scale for each row."""

    activations: bool = False
    by_row: bool = False


class Quantized:
    """A network in one format; ``run`` is like that of a compiled module."""

    def __init__(self, network: Network, nearest: NearestWeights, mode: Mode) -> None:
        self.rows = network.row_sources if mode.by_row else set()
        self.network, self.format, self.tables = network, nearest.format, nearest.tables
        self.compares_result = network.compares_result
        self.weights: dict[str, np.ndarray] = {}
        self.activations: dict[str, tuple[Grid, float]] = {}
        self.corrections: dict[str, np.ndarray] = {}
        self._latest: tuple[str, Received] | None = None
        self._calibrate(nearest, mode.activations)

    def _calibrate(self, nearest: NearestWeights, activations: bool) -> None:
        network = self.network
        flows = [dict(sample) for sample in network.samples]
        with np.errstate(all="ignore"):
            for step in network.program.steps:
                if activations:
                    for source in self._sources(step):
                        self._observe(source, flows)
                if step.name in network.linear:
                    linear = network.linear[step.name]
                    self.weights[step.name] = self._on_data(linear, nearest, flows)
                for values in flows:
                    values[step.name] = self.value(step, values)
                if step.name in network.linear:
                    self._correct(linear, flows)
                for values in flows:
                    network.free(step, values)

    def _on_data(self, linear: Linear, nearest: NearestWeights, flows: Flows) -> np.ndarray:
        candidates = nearest.weights[linear.step.name]
        if self.network.is_large and linear.step.operator == "relax.matmul":
            (rows,) = as_rows(linear, linear.weight)
            return from_rows(linear, self._received(linear.source, flows).rounded(rows, candidates)[None])
        found = None
        if can_round(linear):
            inputs = InputRows(linear, len(flows))
            exact = self.network.exact[0][linear.source]
            for sample, values, received in zip(self.network.samples, exact, flows, strict=True):
                rows = self._read(linear.source, received)
                tokens = valid_tokens(rows.size // rows.shape[-1], sample)
                inputs.add(rows, values, tokens)
            found = least_output_error(linear, candidates, inputs, self.format.searches_scales)
        if found is None:
            rows = as_rows(linear, linear.weight)
            chosen = min(candidates, key=lambda one: float(np.square(one.values - rows).sum()))
        else:
            _, chosen = found
        return from_rows(linear, chosen.values)

    def _received(self, source: str, flows: Flows) -> Received:
        """One for all layers that read ``source``, which follow each other."""
        if self._latest is None or self._latest[0] != source:
            received = [self._read(source, values) for values in flows]
            rows = [
                np.concatenate([x.reshape(-1, x.shape[-1]) for x in of])
                for of in (received, self.network.exact[0][source])
            ]
            self._latest = source, Received(*rows)
        return self._latest[1]

    def _sources(self, step: Step) -> tuple[str, ...]:
        if step.name in self.network.linear:
            return (self.network.linear[step.name].source,)
        return self.network.products[step.name].sources if step.name in self.network.products else ()

    def _observe(self, name: str, flows: list[dict[str, Any]]) -> None:
        if name in self.activations:
            return
        histogram = Histogram()
        for values, sample in zip(flows, self.network.samples, strict=True):
            rows = values[name] / self._row_scale(name, values[name])
            histogram.add(valid_rows(rows.reshape(-1, rows.shape[-1]), sample))
        found = histogram.choose(self.format.activations, self.format.search)
        if name in self.rows and len(found) > 1:
            found = [min(found, key=lambda one: self._layers_error(name, flows, *one))]
        self.activations[name] = found[0]

    def _layers_error(self, name: str, flows: Flows, grid: Grid, scale: float) -> float:
        """Expected error of the dense layers that read ``name``, relative to each row, as the calibration has it.

        Channels that are a hundred times as large as the rest meet small weights, so what errs least in itself may not
        be what the layers would have.
        """
        readers = [linear for linear in self.network.linear.values() if linear.source == name]
        gains = np.sum([np.square(linear.weight).sum(axis=1, dtype=np.float64) for linear in readers], axis=0)
        error = 0.0
        for values, sample in zip(flows, self.network.samples, strict=True):
            rows = valid_rows(values[name].reshape(-1, values[name].shape[-1]), sample)
            difference = grid.round(rows, scale * self._row_scale(name, rows)) - rows
            error += float(row_weights(rows) @ np.square(difference) @ gains)
        return error

    def _correct(self, linear: Linear, flows: Flows) -> None:
        name = linear.step.name
        sums = summed_means(linear, flows, self.network.samples)
        mean = (sums - self.network.exact[1][name]) / len(flows)
        self.corrections[name] = linear.per_channel(mean.astype(np.float32))
        for values in flows:
            values[name] = values[name] - self.corrections[name]

    def _read(self, name: str, values: Values) -> np.ndarray:
        if name not in self.activations:
            return np.asarray(values[name])
        grid, scale = self.activations[name]
        return grid.round(values[name], scale * self._row_scale(name, values[name]))

    def _row_scale(self, name: str, values: np.ndarray) -> np.ndarray | np.float32:
        if name not in self.rows:
            return np.float32(1)
        return np.maximum(np.abs(values).max(-1, keepdims=True), np.float32(SMALLEST))

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
