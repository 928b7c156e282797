"""The NumPy twin of ``qfp8.recurrent``: a recurrent layer's loop over time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from tvm_qfp8.calibration import nonlinear
from tvm_qfp8.recurrent_cell import Cell, Operands
from tvm_qfp8.tables.families import find_function
from tvm_qfp8.tables.numpy_ops import NumpyOps

Product = Callable[[slice, np.ndarray], np.ndarray]
"""``(rows of the weight, operand (batch, hidden)) -> sums with their bias``."""


def run_loop(
    attrs: SimpleNamespace, arguments: tuple, product: Product, function: Callable
) -> tuple[np.ndarray, ...]:
    """Outputs of all steps ``(steps, batch, hidden)`` and the last states ``(batch, hidden)``.

    ``arguments`` are those of ``qfp8.recurrent``; ``function(name, x)`` is a function of ``tables``.
    """
    cell = Cell.of(vars(attrs))
    inputs, _, _, _, lengths, *others = arguments
    states, peepholes = tuple(others[: cell.states]), others[cell.states :]
    steps, batch, _ = inputs.shape
    hidden = states[0].shape[1]
    outputs = np.zeros((steps, batch, hidden), np.float32)

    def part(array: np.ndarray, gate: int) -> np.ndarray:
        return array[..., gate * hidden : (gate + 1) * hidden]

    def peephole(gate: int) -> np.ndarray:
        return part(peepholes[0], gate)

    for t in reversed(range(steps)) if attrs.reverse else range(steps):
        sums = np.empty((batch, cell.gates * hidden), np.float32)
        at = Operands(NumpyOps(), function, partial(part, sums), partial(part, inputs[t]), peephole, states)
        for index, (first, count) in enumerate(cell.products):
            rows = slice(first * hidden, (first + count) * hidden)
            sums[:, rows] = product(rows, cell.reset_state(at) if index else states[0])
        runs = (t < lengths)[:, None]
        new = cell.step(at)
        states = tuple(np.where(runs, n, old) for n, old in zip(new, states, strict=True))
        outputs[t] = np.where(runs, new[0], np.float32(0))
    return (outputs, *states)


def float_product(weight: np.ndarray, bias: np.ndarray) -> Product:
    """The product of float32 operands with a weight ``(gates * hidden, hidden)``."""
    return lambda rows, x: x @ weight[rows].T + bias[rows]


_FUNCTIONS: dict[str, Callable] = {"tanh": np.tanh, "sigmoid": nonlinear.sigmoid}


def float_function(name: str, x: np.ndarray) -> np.ndarray:
    """A function of ``tables`` in float32; the less usual ones are computed in float64."""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name](x)
    return find_function(name).reference(np.asarray(x, np.float64)).astype(np.float32)


def run_float(attrs: SimpleNamespace, *arguments: Any) -> tuple[np.ndarray, ...]:
    """The float32 operator."""
    _, weight, _, bias = arguments[:4]
    return run_loop(attrs, arguments, float_product(weight, bias), float_function)
