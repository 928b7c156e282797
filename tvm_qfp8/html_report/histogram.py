"""One tensor's values against its layout's grid, as the parts of an SVG that the page's template puts together.

The horizontal axis is the magnitude in grid steps, octaves of equal width, so that the grid shows as it is: below 1/2
values become 0, up to ``2**(m+1)`` the codes are one step apart, above they are so many to an octave, and beyond the
largest grid value values are clipped. The vertical axis is the share of values, in decades: few outliers must be seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm_qfp8.distribution import QUARTERS, Distribution, edges
from tvm_qfp8.format import get_layout

LOWEST_OCTAVE, BEYOND = -4, 2
WIDTH, HEIGHT = 260, 70
DECADES = 6  # of parts per million


@dataclass(frozen=True)
class Histogram:
    """What is drawn, in the units of a ``WIDTH`` x ``HEIGHT`` picture, and what is said below it."""

    path: str
    """Outline of the bars."""
    zero_end: float
    """Left of here values become 0."""
    top: float
    """Right of here values are clipped."""
    binades: list[tuple[float, str]]
    """Where the steps of the grid get twice as wide, and at which grid value."""
    caption: str


def histogram(what: str, layout: str, distribution: Distribution) -> Histogram:
    """The picture of a tensor (``what``: "weights" or "activations") in a layout."""
    grid = get_layout(layout)
    octaves = math.ceil(math.log2(grid.max_grid)) + BEYOND - LOWEST_OCTAVE

    def place(magnitude: float) -> float:
        return min(max((math.log2(magnitude) - LOWEST_OCTAVE) / octaves, 0.0), 1.0) * WIDTH

    starts = [place(float(edge)) for edge in edges(distribution.first, len(distribution.ppm))]
    parts = [f"M{starts[0]:.1f} {HEIGHT}"]
    for right, share in zip(starts[1:], distribution.ppm, strict=True):
        height = HEIGHT * (1 - math.log10(share) / DECADES) if share else HEIGHT
        parts.append(f"V{height:.1f}H{right:.1f}")
    parts.append(f"V{HEIGHT}Z")
    exponents = range(grid.mantissa_bits + 1, math.ceil(math.log2(grid.max_grid)) + 1)
    zeros, clipped = distribution.zeros + below_half(distribution), distribution.beyond(grid.max_grid)
    return Histogram(
        path="".join(parts) if distribution.ppm else "",
        zero_end=place(0.5),
        top=place(grid.max_grid),
        binades=[(place(2.0**exponent), str(2**exponent)) for exponent in exponents],
        caption=f"{what}, {layout}: {percent(zeros)} become 0, {percent(clipped)} are clipped",
    )


def below_half(distribution: Distribution) -> float:
    """Share of values that are not 0 and become it."""
    return sum(distribution.ppm[: max(0, -QUARTERS - distribution.first)]) / 1e6


def percent(share: float) -> str:
    """As short as it says something."""
    return f"{100 * share:.2g} %" if 0 < share < 0.1 else f"{100 * share:.0f} %"
