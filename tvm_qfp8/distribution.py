"""How the values of a tensor lie on its layout's grid, small enough to be stored for every layer of a report."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

QUARTERS = 4
"""Bins to an octave: a binade of the grid cut in equal parts."""
LOWEST, HIGHEST = -8, 20
"""Octaves of |x| / scale that are told apart; smaller and larger values are in the first and the last bin."""
_BIAS = 127 * QUARTERS
_DROPPED_BITS = 21  # of a float32: the exponent and two bits of the mantissa are left


@dataclass
class Distribution:
    """Shares of a tensor's values by their magnitude in grid steps, ``|x| / scale``.

    Attributes
    ----------
    zeros : float
        Share of values that are exactly 0.
    first : int
        Of the first bin: bin ``4 e + q`` holds magnitudes from ``2**e (1 + q/4)`` up to where the next one begins.
    ppm : list of int
        For each bin, its share in parts per million; at least 1 where there is any value.
    """

    zeros: float = 0.0
    first: int = 0
    ppm: list[int] = field(default_factory=list)

    def beyond(self, magnitude: float) -> float:
        """Share of values in bins that begin above a magnitude: what is clipped, if that is the largest grid value."""
        starts = edges(self.first, len(self.ppm))[:-1]
        return sum(share for share, start in zip(self.ppm, starts, strict=True) if start > magnitude) / 1e6


def edges(first: int, count: int) -> np.ndarray:
    """Where ``count`` bins from ``first`` on begin, and where the last one ends."""
    index = np.arange(first, first + count + 1)
    return 2.0 ** (index // QUARTERS) * (1 + (index % QUARTERS) / QUARTERS)


def distribution_of(values: np.ndarray, counts: np.ndarray | None = None) -> Distribution:
    """The distribution of values in grid steps, any shape; ``counts`` says how often each occurs (default: once)."""
    magnitude = np.abs(np.ascontiguousarray(values, np.float32)).reshape(-1)
    bins = (magnitude.view(np.int32) >> _DROPPED_BITS) - _BIAS
    bins = np.clip(bins, LOWEST * QUARTERS, HIGHEST * QUARTERS) - LOWEST * QUARTERS
    weight = np.ones(len(bins)) if counts is None else np.asarray(counts, np.float64).reshape(-1)
    total = float(weight.sum())
    if total == 0:
        return Distribution()
    weight = np.where(magnitude > 0, weight, 0.0)
    found = np.bincount(bins, weight, minlength=1) / total
    used = np.flatnonzero(found)
    zeros = 1 - float(weight.sum()) / total
    if not len(used):
        return Distribution(zeros)
    shares = np.where(found > 0, np.maximum(1, np.rint(found * 1e6)), 0)[used[0] : used[-1] + 1]
    return Distribution(zeros, int(used[0]) + LOWEST * QUARTERS, [int(share) for share in shares])
