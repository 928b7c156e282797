"""Recurrent layers: what is quantized in them, and what they compute then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_qfp8.calibration.evaluate import Step, resolve
from tvm_qfp8.calibration.plan import ActivationQuantization, LinearQuantization
from tvm_qfp8.calibration.recurrent import Product, float_function, float_product, run_loop
from tvm_qfp8.format import decode_grid, encode, get_layout
from tvm_qfp8.recurrent_cell import Cell
from tvm_qfp8.tables import build_table

RECURRENT = "relax.qfp8.recurrent"

IN_UNIT = {"Sigmoid", "HardSigmoid"}
"""Functions whose results lie between 0 and 1."""


@dataclass(frozen=True)
class Recurrent:
    """A recurrent layer of one direction; its step's product with the hidden state is quantized.

    Attributes
    ----------
    step : Step
    weight : float32 array ``(gates * hidden, hidden)``
    weight_axis : int
        Output channels in the weight.
    """

    step: Step
    weight: np.ndarray
    weight_axis: int = 0

    @classmethod
    def of(cls, step: Step) -> Recurrent:
        """Of a step of a canonical program."""
        return cls(step, step.arguments[1])

    @property
    def sums(self) -> int:
        """Values of all gates at all steps of one sample."""
        steps, batch, _ = self.step.spec[0].shape  # type: ignore[index, union-attr]
        return steps * batch * len(self.weight)

    @property
    def macs(self) -> int:
        """Multiply-adds of the products of one sample."""
        return self.sums * self.weight.shape[1]

    @property
    def limit(self) -> float | None:
        """What no value of the hidden state exceeds in magnitude, whatever the inputs; None where that is not known."""
        cell = Cell.of(vars(self.step.attrs))
        names = [name for name, _, _ in cell.functions]
        gates, others = ([], names) if cell.kind == "RNN" else (names[:1], names[1:])
        first = self.step.arguments[5]
        bounded = set(gates) <= IN_UNIT and set(others) <= IN_UNIT | {"Tanh", "Softsign"}
        return (
            1.0 if bounded and isinstance(first, np.ndarray) and np.abs(first).max(initial=0) <= 1 else None
        )

    @property
    def _bias(self) -> np.ndarray:
        return self.step.arguments[3]

    def _run(
        self, samples: Sequence[Mapping[str, Any]], product: Product, function: Callable
    ) -> list[tuple[np.ndarray, ...]]:
        """The results of some samples, which go through the loop as one batch."""
        resolved = [resolve(self.step.arguments, values) for values in samples]
        inputs, weight, a, bias, lengths, *others = zip(*resolved, strict=True)
        states = [np.concatenate(state) for state in others[: Cell.of(vars(self.step.attrs)).states]]
        joined = np.concatenate(inputs, axis=1), weight[0], a[0], bias[0], np.concatenate(lengths), *states
        peepholes = (weights[0] for weights in others[len(states) :])
        outputs, *last = run_loop(self.step.attrs, (*joined, *peepholes), product, function)
        parts = [np.split(outputs, len(samples), axis=1), *(np.split(state, len(samples)) for state in last)]
        return list(zip(*parts, strict=True))

    def observed(
        self, samples: Sequence[Mapping[str, Any]]
    ) -> tuple[list[tuple[np.ndarray, ...]], list[tuple[slice, np.ndarray]]]:
        """The float32 results, and what the products of all steps read, with their rows of the weight."""
        seen: list[tuple[slice, np.ndarray]] = []
        float32 = float_product(self.weight, self._bias)

        def product(rows: slice, x: np.ndarray) -> np.ndarray:
            seen.append((rows, x))
            return float32(rows, x)

        return self._run(samples, product, float_function), seen

    def rounded_outputs(
        self, samples: Sequence[Mapping[str, Any]], activation: ActivationQuantization, weight: np.ndarray
    ) -> list[tuple[np.ndarray, ...]]:
        """The results with a rounded hidden state and another weight, all else in float32."""
        exact = float_product(weight, self._bias)
        return self._run(samples, lambda rows, x: exact(rows, activation.rounded(x)), float_function)

    def quantized_outputs(
        self, samples: Sequence[Mapping[str, Any]], chosen: LinearQuantization, max_error: float
    ) -> list[tuple[np.ndarray, ...]]:
        """The results with quantized products and functions as tables."""

        def function(name: str, x: np.ndarray) -> np.ndarray:
            return np.asarray(build_table(name, max_error=max_error)(x))

        return self._run(samples, quantized_product(chosen, self._bias), function)


def quantized_product(chosen: LinearQuantization, bias: np.ndarray) -> Product:
    """The product as the kernel computes it: to the bit, but where activations stay float32."""
    weight, activation = chosen.weight, chosen.activation
    if chosen.bias_correction is not None:
        bias = (bias - chosen.bias_correction).astype(np.float32)
    if activation is None:
        return float_product(weight.dequantize(), bias)
    assert activation.scale is not None  # of one tensor, as no row of it is known before the loop
    layout, activation_scale = get_layout(activation.layout), np.float32(activation.scale)
    exact = decode_grid(weight.codes, weight.layout).astype(np.float64)
    a = np.asarray(weight.scale, np.float32) * activation_scale

    def product(rows: slice, x: np.ndarray) -> np.ndarray:
        # Sums of products of grid values are integers below 2^53.
        total = decode_grid(encode(x, activation_scale, layout), layout) @ exact[rows].T
        return total.astype(np.float32) * a[rows] + bias[rows]

    return product
