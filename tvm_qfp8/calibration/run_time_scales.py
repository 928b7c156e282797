"""How a linear layer reads an activation of which nothing is known before: with scales that are found at run time.

A scale for each row (token, pixel) of what a dense layer reads is decided by the row alone (``topi.encode_rows``), one
for each sample of what other convolutions read by the sample (``topi.encode_samples``), so they need no data.

Bytes multiply twice as fast as int16 values, but a linear layout has the fewest steps for the bulk of a row's values
where a few channels stand out. A rotated row (``topi/rotation.py``) has no such channels, and errs less in E1M6 than
unrotated in E3M4, whose grid spans 2000 to 1 (results/accuracy.json has what is lost, "qfp8 without samples"). Where
channels cannot be rotated, dense layers read E3M4, convolutions E2M5: their channels are evened out by the
normalisation that they were trained with, and its grid is narrow enough for Winograd's algorithm in large tiles
(``topi/winograd_tiling.py``). What is never negative has a layout without a sign.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm_qfp8.calibration.linear import LINEAR_WEIGHTS, Linear, quantized_weight
from tvm_qfp8.calibration.plan import ActivationQuantization, LinearQuantization
from tvm_qfp8.quantize import QTensor
from tvm_qfp8.topi.overflow import INT32_LIMIT, largest_sum
from tvm_qfp8.topi.rotation import largest_order

ROTATED = "E1M6"
"""Layout of rows that are rotated."""

ROWS, PIXELS, IMAGES = ("E3M4", "E2M5"), ("E2M5",), ("E2M5",)
"""Layouts of what dense layers read, 1x1 convolutions, and others: the first whose sums fit int32."""

ROWS_ABOVE_ZERO, PIXELS_ABOVE_ZERO, IMAGES_ABOVE_ZERO = ("UE3M5", "UE2M6"), ("UE1M7",), ("UE2M6",)
"""The same where no value is negative. UE1M7 holds all values of E2M5's grid, and its bytes multiply twice as fast."""

COLOURS, COLOUR_LAYOUTS = 3, ("E1M6",)
"""Channels of an image that is the module's input: they have one unit, and their steps are even, as pixels' are. One
channel may be a spectrogram, which spans more than eight bits."""


def with_scales_at_run_time(
    linear: Linear,
    layout: str | None,
    is_input: bool,
    is_above_zero: bool,
    same: LinearQuantization | None,
    rotates: bool,
) -> LinearQuantization:
    """What becomes of a layer.

    Parameters
    ----------
    linear : Linear
    layout : str or None
        Of the activation; None: the one that fits.
    is_input, is_above_zero : bool
        The layer reads an input of the module; the activation is never negative.
    same : LinearQuantization or None
        Of another layer that has the same weight.
    rotates : bool
        The activation may be rotated, and those of all layers with the same weight are then.
    """
    order = largest_order(len(linear.matrix)) if rotates and linear.reads_rows else 1
    if order > 1:
        activation = ActivationQuantization(ROTATED, scale=None, rotation=order)
        meets = quantized_weight(linear.meeting(activation), LINEAR_WEIGHTS) if same is None else same.weight
        return LinearQuantization(meets, activation)
    weight = quantized_weight(linear, LINEAR_WEIGHTS) if same is None else same.weight
    layouts = _layouts(linear, is_input, is_above_zero) if layout is None else (layout,)
    fits = _first_that_fits(layouts, weight)
    return LinearQuantization(
        weight, ActivationQuantization(fits, scale=None, by_samples=not linear.reads_rows)
    )


def reads_image(linear: Linear) -> bool:
    """A convolution over the pixels of an image of three colours."""
    attrs = linear.step.attrs
    if linear.step.operator != "relax.nn.conv2d" or int(attrs.groups) != 1:
        return False
    extents = dict(zip(attrs.kernel_layout, linear.weight.shape, strict=True))
    return extents["I"] == COLOURS and min(extents["H"], extents["W"]) > 1


def _layouts(linear: Linear, is_input: bool, is_above_zero: bool) -> Sequence[str]:
    if is_input:
        return COLOUR_LAYOUTS
    if linear.step.operator == "relax.matmul":
        return ROWS_ABOVE_ZERO if is_above_zero else ROWS
    if linear.reads_rows:
        return PIXELS_ABOVE_ZERO if is_above_zero else PIXELS
    return IMAGES_ABOVE_ZERO if is_above_zero else IMAGES


def _first_that_fits(layouts: Sequence[str], weight: QTensor) -> str:
    """The first of ``layouts`` whose sums fit int32, else the last."""
    assert weight.axis is not None
    for layout in layouts:
        if largest_sum(weight.codes, weight.axis, weight.layout, layout) < INT32_LIMIT:
            break
    return layout
