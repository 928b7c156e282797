"""The proof that no int32 sum overflows.

TVM marks int32 additions as never wrapping, so every partial sum must fit, in whatever order it is formed. For
constant weights each partial sum is bounded by the sum of magnitudes::

    max over output channels of  sum |G_w| * max |G_x|  <  2**31
"""

from __future__ import annotations

import numpy as np

from tvm_qfp8.format import decode_grid, get_layout

INT32_LIMIT = 2**31


def largest_sum(weight: np.ndarray, axis: int, weight_layout: str, activation_layout: str) -> int:
    """The bound for weight codes whose output channels run along ``axis``."""
    grid = np.abs(decode_grid(weight, weight_layout).astype(np.int64))
    per_channel = np.moveaxis(grid, axis, 0).reshape(weight.shape[axis], -1).sum(axis=1)
    return int(per_channel.max(initial=0)) * get_layout(activation_layout).max_grid
