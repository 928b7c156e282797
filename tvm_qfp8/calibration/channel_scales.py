"""A scale for each channel of an activation that only depthwise convolutions read, where that errs less.

A depthwise convolution does not add channels up, so each may have its own scale: the weights of a channel are divided
by what its activation is multiplied by, and cost nothing. Powers of two bring the largest magnitude of every channel
within a factor of two of the tensor's; the layout and the one scale of what results are found as for any tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from tvm_qfp8.calibration.activations import LAYOUTS, Choice, Observer
from tvm_qfp8.calibration.linear import WEIGHTS, Linear
from tvm_qfp8.calibration.plan import ActivationQuantization
from tvm_qfp8.calibration.rows import Rows
from tvm_qfp8.format import get_layout
from tvm_qfp8.topi.overflow import INT32_LIMIT

LEAST_GAIN = 1.5
"""Of the energy of the layers' error: a scale for each channel takes a load more for each vector that is encoded."""

LARGEST_FACTOR = 2.0**20

LARGEST_PRODUCT = max(get_layout(name).max_grid for name in LAYOUTS) * max(
    get_layout(name).max_grid for name in WEIGHTS
)


def can_have_channel_scales(linears: Sequence[Linear]) -> bool:
    """Only depthwise convolutions with one output for each input channel read it, none so long that sums overflow.

    None that shares its weights, which the scales would change. Where sums may overflow the activation goes back to
    float32 (``overflow_guard``), which has no factors.
    """
    return all(
        linear.is_depthwise
        and not linear.shares
        and int(linear.step.attrs.groups) == _outputs(linear)
        and linear.weight.size // _outputs(linear) * LARGEST_PRODUCT < INT32_LIMIT
        for linear in linears
    )


def _outputs(linear: Linear) -> int:
    return int(linear.weight.shape[linear.weight_axis])


def with_channel_scales(
    choice: Choice, linears: Sequence[Linear], rows: Rows, choose: Callable[[Observer], Choice]
) -> Choice:
    """``choice`` of one scale for the tensor, or a better one of a scale for each channel.

    Parameters
    ----------
    choice : Choice
    linears : sequence of Linear
        The depthwise convolutions that read the activation.
    rows : Rows
        The activation's pixels on calibration data.
    choose : callable ``(observer) -> Choice``
        Layout and scale of a tensor.
    """
    largest = rows.largest
    if choice.activation is None or not 0 < largest.max() < np.inf:
        return choice
    ratio = largest.max() / np.maximum(largest, largest.max() / LARGEST_FACTOR)
    factors = np.exp2(np.floor(np.log2(ratio))).astype(np.float32)
    observer = Observer()
    for part in rows.all():
        observer.record(part * factors)
    found = choose(observer)
    if found.activation is None:
        return choice
    better = replace(found, activation=replace(found.activation, factors=factors))
    assert better.activation is not None
    gains = sum(
        np.square(np.moveaxis(one.weight, one.weight_axis, 0).reshape(_outputs(one), -1)).sum(1)
        for one in linears
    )
    before, after = (_error(one, rows, np.asarray(gains)) for one in (choice.activation, better.activation))
    return better if after * LEAST_GAIN <= before else choice


def _error(activation: ActivationQuantization, rows: Rows, gains: np.ndarray) -> float:
    """Energy of the layers' output error, were all rounding errors independent."""
    factors = np.float32(1) if activation.factors is None else activation.factors
    total = 0.0
    for part in rows.all():
        difference = activation.rounded(part) / factors - part
        total += float(np.square(difference).sum(axis=0, dtype=np.float64) @ gains)
    return total
