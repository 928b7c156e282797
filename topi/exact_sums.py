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
    columns, depth = weights.shape
    magnitudes = (
        np.abs(decode_grid(weights, weight).astype(np.int64)).reshape(columns, depth // step, step).sum(2)
    )
    bound = (limit - 1) // activation.max_grid
    count = depth // step
    while count:
        starts = range(0, depth // step, count)
        if max(int(magnitudes[:, at : at + count].sum(1).max()) for at in starts) <= bound:
            return count
        count = count * 3 // 4 if count > 1 else 0
    return 0
