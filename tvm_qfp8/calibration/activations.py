"""The distribution of one activation tensor over all samples, and the layout and scale chosen from it.

All values count, not a subsample: a few large values in one channel of one pixel (MobileNetV2 has them) carry
a layer's result, are worth a coarser step, and are not met by any subsample of bearable size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tvm_qfp8.calibration.plan import ActivationQuantization
from tvm_qfp8.calibration.thresholds import threshold
from tvm_qfp8.distribution import Distribution, distribution_of
from tvm_qfp8.format import get_layout

LAYOUTS = ("E2M5", "E3M4", "UE2M6", "UE3M5")
NARROW_LAYOUTS = ("E2M5", "UE2M6")
LINEAR_LAYOUTS = ("E1M6", "UE1M7")
_DROPPED_BITS = (
    14  # of a float32: bins of sign-less exponent and 9 mantissa bits, 4 or more to a rounding step
)
_MASK = 1000.0  # nothing smaller than this is taken for a mask
_STEPS = np.arange(-16, 161)  # scales tried, in 1/16 octaves below the one that holds the largest value
_GOLDEN = (5**0.5 - 1) / 2
_MIN_SCALE = 2.0**-126


@dataclass(frozen=True)
class Choice:
    """How an activation is rounded, or None: it stays float32 and ``note`` says why.

    ``distribution`` is how the values lie on the layout's grid, for the report.
    """

    activation: ActivationQuantization | None
    note: str = ""
    distribution: Distribution | None = None


class Observer:
    """Collects the range of a tensor and a histogram of its magnitudes, one sample at a time."""

    def __init__(self) -> None:
        self._bins = np.empty(0, np.int64)  # those with values, sorted
        self._counts, self._sums = np.empty(0, np.int64), np.empty(0)
        self._low, self._high = math.inf, -math.inf

    def record(self, value: np.ndarray, tokens: np.ndarray | None = None) -> None:
        """Add one sample's float32 tensor; ``tokens`` picks the rows that enter the histogram.

        The range is that of all rows: a layout without a sign must suit them all.
        """
        self._low = float(np.minimum(self._low, value.min()))
        self._high = float(np.maximum(self._high, value.max()))
        if tokens is not None:
            value = value.reshape(-1, value.shape[-1])[tokens]
        magnitude = np.abs(np.ascontiguousarray(value, np.float32)).reshape(-1)
        bins = magnitude.view(np.int32) >> _DROPPED_BITS
        counts, sums = np.bincount(bins), np.bincount(bins, magnitude)
        used = np.flatnonzero(counts)
        has_values = np.zeros(max(len(counts), int(self._bins.max(initial=0)) + 1), np.bool_)
        has_values[self._bins] = has_values[used] = True
        both = np.flatnonzero(has_values)
        old, new = np.searchsorted(both, self._bins), np.searchsorted(both, used)
        total_counts, total_sums = np.zeros(len(both), np.int64), np.zeros(len(both))
        total_counts[old], total_sums[old] = self._counts, self._sums
        total_counts[new] += counts[used]
        total_sums[new] += sums[used]
        self._bins, self._counts, self._sums = both, total_counts, total_sums

    def holding(self, layouts: Sequence[str]) -> list[str]:
        """Those of ``layouts`` with a sign, and those without if no value of any sample was negative."""
        return [name for name in layouts if get_layout(name).signed or self._low >= 0]

    def choose(self, layouts: Sequence[str] = LAYOUTS, method: str = "mse") -> Choice:
        """Layout and scale of least squared error over all values of all samples.

        Another ``method`` than "mse" (see ``thresholds``) fixes each layout's scale by the magnitude that its
        largest grid value stands for; the layout is still that of least squared error.

        A tensor with values that no
        layout can hold together with the rest (see ``_bulk_limit``), as a mask of -10000 makes them, gets no
        layout: least squares would round the rest to nothing, dropping the large values would clip a signal
        a thousand times the rest, and a float32 activation with an 8-bit weight does neither.
        """
        if not (math.isfinite(self._low) and math.isfinite(self._high)):
            return Choice(None, "the activation holds NaN or infinity")
        allowed = self.holding(layouts)
        if not allowed:
            return Choice(None, f"negative values, and no signed layout among {', '.join(layouts)}")
        used = np.flatnonzero(self._sums)
        if not len(used):
            return Choice(ActivationQuantization(allowed[0], 1.0))
        counts = self._counts[used].astype(np.float64)
        values = self._sums[used] / counts
        limit = _bulk_limit(values, counts, max(get_layout(name).max_grid for name in allowed))
        if limit is not None:
            found = f"values up to {values[-1]:.4g} beside a bulk within {limit:.4g}"
            return Choice(None, f"no 8-bit layout holds {found} (a mask?)")
        if method == "mse":
            best = {name: _least_error(values, counts, name) for name in allowed}
        else:
            best = {
                name: _error_at(values, counts, name, threshold(method, values, counts, name))
                for name in allowed
            }
        layout = min(allowed, key=lambda name: best[name][0])
        scale = best[layout][1]
        return Choice(ActivationQuantization(layout, scale), distribution=self.distribution(scale))

    def distribution(self, scale: float = 1.0) -> Distribution:
        """How the magnitudes lie on a grid."""
        used = self._sums > 0
        counts = self._counts[used].astype(np.float64)
        zeros = self._counts.sum() - counts.sum()
        return distribution_of(np.append(self._sums[used] / counts / scale, 0.0), np.append(counts, zeros))


def _bulk_limit(values: np.ndarray, counts: np.ndarray, widest: int) -> float | None:
    """Largest magnitude of the bulk if a gap parts it from values no layout can hold with it, else None.

    A mask (-10000 added where a token is missing) is the usual cause. ``widest`` is the largest grid value
    of the layouts at hand: with the large values at the top of the grid, everything below 1/widest of them
    has less than one step, so a bulk beyond a gap of widest / 8 keeps under 3 bits. The large values must
    be at least 1000, as masks are (probabilities and gates have such gaps, but below 1), and the bulk
    must be more than 1 % of the values that are not zero.
    """
    below, above = values[:-1], values[1:]
    gap = (above >= _MASK) & (above > below * (widest / 8)) & (np.cumsum(counts)[:-1] > counts.sum() / 100)
    places = np.flatnonzero(gap)
    return float(below[places[0]]) if len(places) else None


def _squared_errors(
    values: np.ndarray, counts: np.ndarray, layout: str
) -> Callable[[Sequence[float]], list[float]]:
    """Squared errors of a layout as a function of the scales, for sorted magnitudes and their counts.

    With n, s1 the count and sum of what rounds to grid value g, and S2 the sum of all squares, the error at
    scale s is ``S2 + sum((g s)^2 n - 2 g s s1)``: one binary search per grid value, no rounding of values.
    """
    grid = get_layout(layout).grid[: get_layout(layout).magnitudes].astype(np.float64)
    middles = (grid[1:] + grid[:-1]) / 2
    cumulated_counts = np.concatenate([[0.0], np.cumsum(counts)])
    cumulated_sums = np.concatenate([[0.0], np.cumsum(counts * values)])
    squares = float(np.dot(counts, values * values))

    def errors(scales: Sequence[float]) -> list[float]:
        column = np.array(scales)[:, None]
        edges = np.zeros((len(scales), len(grid) + 1), np.intp)
        edges[:, 1:-1], edges[:, -1] = np.searchsorted(values, middles * column), len(values)
        levels = grid * column
        n, s1 = (
            cumulated[edges[:, 1:]] - cumulated[edges[:, :-1]]
            for cumulated in (cumulated_counts, cumulated_sums)
        )
        changes = levels * n - 2 * s1
        return [squares + float(np.dot(*pair)) for pair in zip(levels, changes, strict=True)]

    return errors


def _error_at(values: np.ndarray, counts: np.ndarray, layout: str, largest: float) -> tuple[float, float]:
    """Squared error and scale with ``largest`` on the largest grid value."""
    scale = float(np.float32(max(largest / get_layout(layout).max_grid, _MIN_SCALE)))
    return _squared_errors(values, counts, layout)([scale])[0], scale


def _least_error(values: np.ndarray, counts: np.ndarray, layout: str) -> tuple[float, float]:
    """Squared error and scale at the best scale of a layout, for sorted magnitudes and their counts."""
    found = get_layout(layout)
    errors = _squared_errors(values, counts, layout)

    def scale_at(step: float) -> float:
        return float(np.float32(max(values[-1] / found.max_grid * 2 ** (-step / 16), _MIN_SCALE)))

    def errors_at(*steps: float) -> list[tuple[float, float]]:
        return list(zip(errors([scale_at(step) for step in steps]), steps, strict=True))

    tried = errors_at(*map(float, _STEPS))
    low, high = min(tried)[1] - 1, min(tried)[1] + 1
    for _ in range(12):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        tried += errors_at(left, right)
        low, high = (low, right) if tried[-2][0] <= tried[-1][0] else (left, high)
    least, step = min(tried)
    return least, scale_at(step)
