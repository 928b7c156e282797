"""A scale for each row (token) instead of one for the tensor, where dense layers read it and err less so.

In transformers a few tokens and a few channels are a hundred times as large as the rest, and one scale for all leaves
little of it. A row's scale is found when the row is there. Channels are evened out before: what an outlying channel is
divided by, the weights that meet it are multiplied by (Xiao et al., "SmoothQuant", ICML 2023, section 4, with a
strength of one half). Row scales cost a pass over the activation, so they must gain something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from tvm_qfp8.calibration.activations import Choice, Observer
from tvm_qfp8.calibration.fake_quantize import row_scales
from tvm_qfp8.calibration.linear import COMPARED_CHANNELS, Linear
from tvm_qfp8.calibration.output_error import row_weights
from tvm_qfp8.calibration.plan import ActivationQuantization
from tvm_qfp8.format import get_layout
from tvm_qfp8.quantize import quantize
from tvm_qfp8.topi.overflow import INT32_LIMIT

LEAST_GAIN = 1.5
"""Of the energy of the layers' expected error."""

SMALLEST = 2.0**-10
"""Of the largest channel: smaller ones are evened out no further."""

Rows = Callable[[], Iterable[np.ndarray]]
"""Gives the rows of each sample's activation, float32 ``(rows, channels)``."""


def can_have_row_scales(linears: Sequence[Linear]) -> bool:
    """Only dense layers read it."""
    return all(linear.step.operator == "relax.matmul" for linear in linears)


def with_row_scales(
    choice: Choice,
    linears: Sequence[Linear],
    rows: Rows,
    layouts: Sequence[str],
    weights: Sequence[str],
) -> Choice:
    """``choice`` of one scale for the tensor, or a better one of row scales in one of ``layouts``.

    Parameters
    ----------
    choice : Choice
    linears : sequence of Linear
        The dense layers that read the activation.
    rows : callable
        The activation on calibration data; called several times.
    layouts : sequence of str
        Those that hold the activation.
    weights : sequence of str
        Layouts that the layers' weights may have.
    """
    factors = _factors(linears, rows)
    if choice.activation is None or factors is None:
        return choice
    depth, largest = len(factors), max(get_layout(name).max_grid for name in weights)
    candidates = [
        ActivationQuantization(layout, None, factors)
        for layout in layouts
        if depth * largest * get_layout(layout).max_grid < INT32_LIMIT
    ]
    if not candidates:
        return choice
    plain, *errors = _expected_errors([choice.activation, *candidates], linears, rows, weights[0])
    best = int(np.argmin(errors))
    if errors[best] * LEAST_GAIN > plain:
        return choice
    observer = Observer()
    for part in rows():
        values = part * factors
        observer.record(values / row_scales(values, candidates[best].layout))
    return replace(choice, activation=candidates[best], distribution=observer.distribution())


def _factors(linears: Sequence[Linear], rows: Rows) -> np.ndarray | None:
    """What channels are multiplied by, float32; None where activation or weights are zero.

    All 1 where a weight is also that of other layers.
    """
    activation = np.max([np.abs(part).max(axis=0, initial=0.0) for part in rows()], axis=0)
    weight = np.max([np.abs(linear.weight).max(axis=1) for linear in linears], axis=0)
    if not (0 < activation.max() < np.inf and weight.max() > 0):
        return None
    if any(linear.shares for linear in linears):
        return np.ones(activation.shape, np.float32)
    activation, weight = (np.maximum(v, SMALLEST * v.max()).astype(np.float64) for v in (activation, weight))
    logarithm = np.log2(weight / activation) / 2
    return np.exp2(logarithm - logarithm.mean()).astype(np.float32)


def _expected_errors(
    tried: Sequence[ActivationQuantization], linears: Sequence[Linear], rows: Rows, layout: str
) -> list[float]:
    """Energy of the layers' output error relative to each row's, were all rounding errors independent.

    For each of ``tried``, of which all but the first have the same factors; weights in ``layout``.
    """
    energy: np.ndarray | float = 0.0
    errors: list[np.ndarray | float] = [0.0] * len(tried)
    for part in rows():
        importance = row_weights(part)
        energy = energy + importance @ np.square(part)
        for index, activation in enumerate(tried):
            difference = activation.rounded(part) / _factors_of(activation, linears[0]) - part
            errors[index] = errors[index] + importance @ np.square(difference)
    totals = [0.0] * len(tried)
    for linear in linears:
        gains = np.square(linear.weight).sum(axis=1, dtype=np.float64)
        plain, evened = (_weight_error(linear, activation, energy, layout) for activation in tried[:2])
        for index, error in enumerate(errors):
            totals[index] += float(gains @ error)
            totals[index] += evened if index else plain
    return totals


def _weight_error(
    linear: Linear, activation: ActivationQuantization, energy: np.ndarray | float, layout: str
) -> float:
    """What rounding the weight that meets ``activation`` adds to it; ``energy`` is that of each input channel."""
    weight = linear.weight
    some = activation.divided(weight, 0)[:, :: max(1, weight.shape[1] // COMPARED_CHANNELS)]
    off = (quantize(some, axis=1, layout=layout).dequantize() - some) * _factors_of(activation, linear)[
        :, None
    ]
    return float(np.square(off).sum(axis=1, dtype=np.float64) @ energy) * weight.shape[1] / some.shape[1]


def _factors_of(activation: ActivationQuantization, linear: Linear) -> np.ndarray:
    channels = linear.weight.shape[0]
    return np.ones(channels, np.float32) if activation.factors is None else activation.factors
