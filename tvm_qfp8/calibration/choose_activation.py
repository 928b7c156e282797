"""How an activation is rounded: among all layouts or linear ones, with one scale or one for each row or channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm_qfp8.calibration.activations import LAYOUTS, LINEAR_LAYOUTS, Choice, Observer
from tvm_qfp8.calibration.channel_scales import can_have_channel_scales, with_channel_scales
from tvm_qfp8.calibration.linear import LINEAR_WEIGHTS, WEIGHTS, Linear
from tvm_qfp8.calibration.row_scales import Rows, can_have_row_scales, with_row_scales

ROW_LAYOUTS, LINEAR_ROW_LAYOUTS = ("E2M5", "E3M4", "UE2M6", "UE3M5"), ("E1M6", "UE1M7")
"""With a scale for each row, which its largest magnitude decides."""

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

    def choose(self, observer: Observer, linears: Sequence[Linear], rows: Rows, in_bytes: bool) -> Choice:
        """For an activation that ``linears`` read, and nothing else that is quantized; it may be none.

        Parameters
        ----------
        observer : Observer
            Of all samples.
        linears : sequence of Linear
        rows : callable
            As in ``with_row_scales``.
        in_bytes : bool
            In linear layouts.
        """
        if not self.layouts:
            return Choice(None, "activations stay float32 by configuration")
        allowed = LINEAR_LAYOUTS if in_bytes else self.layouts
        choice = observer.choose(allowed, self.method)
        if not self.own_scales or not linears:
            return choice
        if can_have_channel_scales(linears):
            return with_channel_scales(choice, linears, rows, lambda seen: seen.choose(allowed, self.method))
        if not can_have_row_scales(linears):
            return choice
        layouts, weights = (LINEAR_ROW_LAYOUTS, LINEAR_WEIGHTS) if in_bytes else (ROW_LAYOUTS, WEIGHTS)
        return with_row_scales(choice, linears, rows, observer.holding(layouts), weights)
