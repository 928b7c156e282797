"""How an activation is rounded: among all layouts or linear ones, with one scale or one for each row or channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm_qfp8.calibration.activations import LAYOUTS, LINEAR_LAYOUTS, NARROW_LAYOUTS, Choice, Observer
from tvm_qfp8.calibration.channel_scales import can_have_channel_scales, with_channel_scales
from tvm_qfp8.calibration.linear import LINEAR_WEIGHTS, WEIGHTS, Linear
from tvm_qfp8.calibration.row_scales import can_have_row_scales, with_row_scales
from tvm_qfp8.calibration.rows import Rows


@dataclass(frozen=True)
class Grade:
    """Layouts that an activation and the weights that meet it may have, by what their products cost.

    Attributes
    ----------
    activations, weights : tuple of str
    cost : int
        Of a multiply-add, relative.
    by_pixel : bool
        Whether pixels that 1x1 convolutions read have scales of their own, too, as rows of dense layers may.
    """

    activations: tuple[str, ...]
    weights: tuple[str, ...]
    cost: int
    by_pixel: bool = False


ANY, NARROW, BYTES, LINEAR_PIXELS, LINEAR = (
    Grade(LAYOUTS, WEIGHTS, 3),
    Grade(NARROW_LAYOUTS, WEIGHTS, 2),
    Grade(LAYOUTS, LINEAR_WEIGHTS, 2),
    Grade(LINEAR_LAYOUTS, LINEAR_WEIGHTS, 1, by_pixel=True),
    Grade(LINEAR_LAYOUTS, LINEAR_WEIGHTS, 1),
)
"""Linear grid values are bytes, multiplied twice as fast as int16 values with VNNI. Layouts of three exponent bits take
two products of tiles or on tensor cores, where sums of their large grid values would soon be inexact in float32, but
one of int16 values; their cost stands for both. Weights that are bytes meet any activation in two products of bytes.
Scales of pixels are found in a pass over the activation."""

FLOAT32 = "float32"
"""Stands for no layout."""


@dataclass(frozen=True)
class ActivationChooser:
    """What a configuration allows.

    Attributes
    ----------
    layouts : tuple of str
        For an activation with one scale that is not multiplied as bytes; none: activations stay float32.
    method : str
        How its scale is found.
    own_scales : bool
        Whether rows and channels may have scales of their own.
    """

    layouts: tuple[str, ...] = LAYOUTS
    method: str = "mse"
    own_scales: bool = True

    def choose(self, observer: Observer, linears: Sequence[Linear], rows: Rows, grade: Grade = ANY) -> Choice:
        """For an activation that ``linears`` read, and nothing else that is quantized; it may be none.

        Parameters
        ----------
        observer : Observer
            Of all samples.
        linears : sequence of Linear
        rows : Rows
            As in ``with_row_scales``.
        grade : Grade
            ``ANY``: what the configuration allows.
        """
        if not self.layouts:
            return Choice(None, "activations stay float32 by configuration")
        allowed = self.layouts if grade is ANY else grade.activations
        choice = observer.choose(allowed, self.method)
        if not self.own_scales or not linears:
            return choice
        if can_have_channel_scales(linears):
            return with_channel_scales(choice, linears, rows, lambda seen: seen.choose(allowed, self.method))
        if not can_have_row_scales(linears, grade.by_pixel):
            return choice
        return with_row_scales(choice, linears, rows, observer.holding(grade.activations), grade.weights)
