"""A transposed convolution as convolutions over its own pixels, one for each place that an output has in a stride.

With zeros between the pixels most multiply-adds would meet zeros: of a stride of two, three in four. The outputs of one
phase, every second one of every second row, meet the same taps of the window, and only pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.conv2d import ConvShape


@dataclass(frozen=True)
class _Axis:
    """The outputs ``first, first + stride, ...`` along an axis."""

    first: int
    tap: int
    """Of the window, the first that meets pixels; others follow by strides."""
    taps: int
    before: int
    after: int
    """Padding."""


@dataclass(frozen=True)
class Phase:
    """A convolution that gives the outputs of one phase of a transposed one, ``whole``."""

    whole: ConvShape
    shape: ConvShape
    rows: _Axis
    columns: _Axis

    def codes(self, codes: np.ndarray) -> np.ndarray:
        """Of the weights OHWI of the whole."""
        step_h, step_w = self.whole.input_dilation
        return np.ascontiguousarray(codes[:, self.rows.tap :: step_h, self.columns.tap :: step_w])

    def placed(self, epilogue: Callable) -> Callable:
        """``epilogue`` of the whole, for this phase's own."""
        (step_h, step_w), width = self.whole.input_dilation, self.shape.out_width

        def place(total, pixel, column, valid) -> None:
            row = T.bind(pixel // width)
            image = T.bind(row // self.shape.out_height)
            down = (row - image * self.shape.out_height) * step_h + self.rows.first
            across = (pixel - row * width) * step_w + self.columns.first
            target = T.bind((image * self.whole.out_height + down) * self.whole.out_width + across)
            epilogue(total, target, column, valid)

        return place


def phases_of(shape: ConvShape) -> list[Phase]:
    """All phases of a transposed convolution; none where some output meets no pixel, or the window is dilated."""
    if shape.stride != (1, 1) or shape.dilation != (1, 1) or shape.input_dilation == (1, 1):
        return []
    top, left, _, _ = shape.padding
    extents = (shape.height, shape.out_height, top), (shape.width, shape.out_width, left)
    axes = [
        [_axis(first, stride, taps, *extent) for first in range(min(stride, extent[1]))]
        for stride, taps, extent in zip(shape.input_dilation, shape.kernel, extents, strict=True)
    ]
    if not all(axis.taps > 0 and axis.before >= 0 and axis.after >= 0 for along in axes for axis in along):
        return []
    return [
        Phase(
            shape,
            replace(
                shape,
                kernel=(rows.taps, columns.taps),
                padding=(rows.before, columns.before, rows.after, columns.after),
                input_dilation=(1, 1),
            ),
            rows,
            columns,
        )
        for rows in axes[0]
        for columns in axes[1]
    ]


def _axis(first: int, stride: int, window: int, extent: int, outputs: int, before: int) -> _Axis:
    """With ``before`` places before the pixels, which are ``stride`` apart, output o and tap k meet o + k - before."""
    tap = (before - first) % stride
    taps = -(-(window - tap) // stride)
    skipped = (first + tap - before) // stride
    count = -(-(outputs - first) // stride)
    return _Axis(first, tap, taps, -skipped, count + taps - 1 - extent + skipped)
