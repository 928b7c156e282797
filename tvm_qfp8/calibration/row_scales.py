"""A scale for each row (token) instead of one for the tensor, where dense layers read it and err less so.

In transformers a few tokens and a few channels are a hundred times as large as the rest, and one scale for all leaves
little of it. A row's scale is found when the row is there. Channels are evened out before: what an outlying channel is
divided by, the weights that meet it are multiplied by (Xiao et al., "SmoothQuant", ICML 2023, section 4, with the
strength that errs least). Linear layouts, which have the fewest steps for the bulk of values with outliers, may also
have rows rotated (``topi/rotation.py``): then a row of LayerNorm's results loses as little in them as in E2M5. Row
scales cost a pass over the activation, and a rotation another, so they must gain something.

In convolutional networks it is a few pixels that are far larger. There the pass is one more, since what computes an
activation with one scale encodes it, too: pixels that 1x1 convolutions read get scales of their own only for linear
layouts, whose products save more time than it takes (``grades.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from tvm_qfp8.calibration.activations import LINEAR_LAYOUTS, Choice, Observer
from tvm_qfp8.calibration.fake_quantize import row_scales
from tvm_qfp8.calibration.linear import COMPARED_CHANNELS, Linear
from tvm_qfp8.calibration.output_error import row_weights
from tvm_qfp8.calibration.plan import ActivationQuantization
from tvm_qfp8.calibration.rows import Rows
from tvm_qfp8.format import get_layout
from tvm_qfp8.quantize import quantize
from tvm_qfp8.topi.overflow import INT32_LIMIT
from tvm_qfp8.topi.rotation import largest_order

LEAST_GAIN = 1.5
"""Of the energy of the layers' expected error."""

ROTATION_GAIN = 1.25
"""The same of a rotation."""

STRENGTHS = (0.5, 0.4, 0.3)
"""How much of the outliers goes to the weights: half after LayerNorm, less after GELU."""

LEAST_ROWS = 16
"""That tell the mean."""

SMALLEST = 2.0**-10
"""Of the largest channel: smaller ones are evened out no further."""


def can_have_row_scales(linears: Sequence[Linear], by_pixel: bool = False) -> bool:
    """Only dense layers read it, or with ``by_pixel`` 1x1 convolutions."""
    return all(
        linear.reads_rows if by_pixel else linear.step.operator == "relax.matmul" for linear in linears
    )


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
    rows : Rows
        Of the activation on calibration data.
    layouts : sequence of str
        Those that hold the activation.
    weights : sequence of str
        Layouts that the layers' weights may have.
    """
    largest = rows.largest
    if (
        choice.activation is None
        or not 0 < largest.max() < np.inf
        or not any(w.weight.any() for w in linears)
    ):
        return choice
    depth, widest = len(largest), max(get_layout(name).max_grid for name in weights)
    fitting = [name for name in layouts if depth * widest * get_layout(name).max_grid < INT32_LIMIT]
    compared = [(part, row_weights(part)) for part in rows.some]

    def errors(alike: list[ActivationQuantization]) -> list[float]:
        return _expected_errors(alike, linears, compared, weights[0])

    candidates = [
        (error * (ROTATION_GAIN if one.rotation > 1 else 1), one)
        for alike in _candidates(fitting, linears, largest)
        for error, one in zip(errors(alike), alike, strict=True)
    ]
    if not candidates:
        return choice
    least, chosen = min(candidates, key=lambda candidate: candidate[0])
    (plain,) = errors([choice.activation])
    if least * LEAST_GAIN > plain:
        return choice
    observer = Observer()
    for part in rows.all():
        values = chosen.prepared(part)
        observer.record(values / row_scales(values, chosen.layout))
    return replace(choice, activation=chosen, distribution=observer.distribution())


def _candidates(
    layouts: Sequence[str], linears: Sequence[Linear], largest: np.ndarray
) -> Iterator[list[ActivationQuantization]]:
    """What may become of rows whose channels' magnitudes are ``largest`` at most, what is prepared alike together.

    All factors 1 and no rotation where a weight is also that of other layers.
    """
    if any(linear.shares for linear in linears):
        yield [ActivationQuantization(layout, None, np.ones(largest.shape, np.float32)) for layout in layouts]
        return
    order = largest_order(len(largest))
    rotatable = [name for name in layouts if name in LINEAR_LAYOUTS and get_layout(name).signed]
    for strength in STRENGTHS:
        factors = _factors(linears, largest, strength)
        yield [ActivationQuantization(layout, None, factors) for layout in layouts]
        if order > 1 and rotatable:
            yield [ActivationQuantization(layout, None, factors, rotation=order) for layout in rotatable]


def _factors(linears: Sequence[Linear], activation: np.ndarray, strength: float) -> np.ndarray:
    """What channels are multiplied by, float32."""
    weight = np.max([np.abs(linear.matrix).max(axis=1) for linear in linears], axis=0)
    activation, weight = (np.maximum(v, SMALLEST * v.max()).astype(np.float64) for v in (activation, weight))
    logarithm = (1 - strength) * np.log2(weight) - strength * np.log2(activation)
    return np.exp2(logarithm - logarithm.mean()).astype(np.float32)


def _expected_errors(
    alike: Sequence[ActivationQuantization],
    linears: Sequence[Linear],
    rows: Sequence[tuple[np.ndarray, np.ndarray]],
    layout: str,
) -> list[float]:
    """Energy of the layers' output error, were all rounding errors independent.

    What rounding the weights adds to the mean output counts for nothing: the bias makes up for it.

    Parameters
    ----------
    alike : sequence of ActivationQuantization
        That prepare rows, and the weights that meet them, in the same way.
    linears : sequence of Linear
    rows : sequence of (rows, what each row's error counts)
    layout : str
        Of the weights.
    """
    if not alike:
        return []
    errors: list[np.ndarray | float] = [0.0] * len(alike)
    energy: np.ndarray | float = 0.0
    mean: np.ndarray | float = 0.0
    weights, count = 0.0, 0
    for part, counts in rows:
        prepared = alike[0].prepared(part)
        for index, activation in enumerate(alike):
            difference = activation.on_grid(prepared) - prepared
            errors[index] = errors[index] + counts @ np.square(difference)
        energy = energy + counts @ np.square(prepared)
        mean = mean + counts @ prepared
        weights, count = weights + float(counts.sum()), count + len(part)
    if count >= LEAST_ROWS:
        energy = np.maximum(energy - np.square(mean) / weights, 0.0)
    totals = [0.0] * len(alike)
    for linear in linears:
        weight = alike[0].met_by(linear.matrix, 0)
        gains = np.square(weight).sum(axis=1, dtype=np.float64)
        some = weight[:, :: max(1, weight.shape[1] // COMPARED_CHANNELS)]
        off = quantize(some, axis=1, layout=layout).dequantize() - some
        share = weight.shape[1] / some.shape[1]
        of_weight = float(np.square(off).sum(axis=1, dtype=np.float64) @ energy) * share
        totals = [
            total + float(gains @ error) + of_weight for total, error in zip(totals, errors, strict=True)
        ]
    return totals
