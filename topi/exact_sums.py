"""How long a sum of matrix units stays exact: a GPU's tensor cores, a CPU's tile registers.

They add products to a float32 accumulator. Products of grid values are integers, so nothing is rounded while
no partial sum, in whatever order, can reach 2**24: the sum of magnitudes bounds them all. Weights are constants, so the
actual ones decide.
"""

from __future__ import annotations

import numpy as np

from tvm_qfp8.format import Layout, decode_grid

EXACT = 2**24
"""Integers below this are float32 numbers, and aligned in the 24 bits that a tensor core keeps at least."""


def exact_steps(
    weights: np.ndarray, weight: Layout, activation: Layout, step: int, limit: int = EXACT
) -> int:
    """The most steps of ``step`` neighbouring products whose sum is below ``limit``; 0 where not even one's is.

    Parameters
    ----------
    weights : array ``(columns, depth)`` of uint8
        Codes in the order of the reduction, ``depth`` a multiple of ``step``.
    """
    magnitudes, bound = step_magnitudes(weights, weight, step), (limit - 1) // activation.max_grid
    count = magnitudes.shape[1]
    while count and not are_exact(magnitudes, count, bound):
        count = count * 3 // 4 if count > 1 else 0
    return count


def step_magnitudes(weights: np.ndarray, weight: Layout, step: int) -> np.ndarray:
    """Sums of the magnitudes of ``step`` neighbouring grid values, int64 ``(columns, depth / step)``."""
    columns, depth = weights.shape
    return np.abs(decode_grid(weights, weight).astype(np.int64)).reshape(columns, depth // step, step).sum(2)


def are_exact(magnitudes: np.ndarray, count: int, bound: int) -> bool:
    """Whether blocks of ``count`` steps, one after the other, have magnitudes of at most ``bound`` each."""
    starts = np.arange(0, magnitudes.shape[1], count)
    return int(np.add.reduceat(magnitudes, starts, axis=1).max(initial=0)) <= bound
