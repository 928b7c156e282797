"""Scales of least squared error, or of the largest value, by one and the same search for every grid."""

from __future__ import annotations

import numpy as np

from format_study.grids import Grid

STEPS_PER_OCTAVE = 8
OCTAVES_BELOW = 3
FINE = np.arange(-3, 4) / (4 * STEPS_PER_OCTAVE)
SMALLEST = 2.0**-100
PART = 1 << 16
"""Values that are rounded at a time, as far as rows allow: they stay in a core's cache."""


def candidates(grid: Grid) -> np.ndarray:
    """Octaves relative to the scale that puts the largest value on the largest level."""
    return (
        np.arange(-OCTAVES_BELOW * STEPS_PER_OCTAVE, grid.headroom * STEPS_PER_OCTAVE + 1) / STEPS_PER_OCTAVE
    )


def weight_scale(rows: np.ndarray, grid: Grid, search: str) -> np.ndarray:
    """Scales ``(channels,)`` of float32 ``(channels, values)``; ``search`` is "max" or "mse"."""
    parts = np.array_split(rows, min(len(rows), -(-rows.size // PART)))
    return np.concatenate([_weight_scale(part, grid, search) for part in parts])


def _weight_scale(rows: np.ndarray, grid: Grid, search: str) -> np.ndarray:
    top = np.maximum(np.abs(rows).max(axis=1) / grid.top, SMALLEST)
    if search == "max":
        return top
    octave = _least(rows, grid, top, np.zeros(len(rows)), candidates(grid))
    return top * 2.0 ** _least(rows, grid, top, octave, FINE)


def _least(
    rows: np.ndarray, grid: Grid, top: np.ndarray, center: np.ndarray, offsets: np.ndarray
) -> np.ndarray:
    errors = []
    for offset in offsets:
        scale = (top * 2.0 ** (center + offset))[:, None]
        difference = grid.round(rows, scale) - rows
        errors.append(np.einsum("ij,ij->i", difference, difference))
    return center + offsets[np.argmin(errors, axis=0)]


class Histogram:
    """Values of an activation over all samples, as counts and means by the leading bits of a float32."""

    _BITS = 14

    def __init__(self) -> None:
        self._counts = np.zeros(1 << (32 - self._BITS))
        self._sums = np.zeros(1 << (32 - self._BITS))

    def add(self, values: np.ndarray) -> None:
        """Count the values of one sample."""
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        bins = (flat.view(np.uint32) >> self._BITS).astype(np.int64)
        self._counts += np.bincount(bins, minlength=len(self._counts))
        self._sums += np.bincount(bins, flat, minlength=len(self._sums))

    def choose(self, grids: tuple[Grid, ...], search: str) -> list[tuple[Grid, float]]:
        """Grids with their scales, the one of least squared error first; unsigned ones only if nothing is negative."""
        used = np.flatnonzero(self._counts)
        counts = self._counts[used]
        values = (self._sums[used] / counts).astype(np.float32)
        found: list[tuple[float, int, Grid, float]] = []
        for grid in grids:
            if not grid.signed and values.min() < 0:
                continue
            top = max(float(np.abs(values).max()) / grid.top, SMALLEST)
            octaves = np.zeros(1) if search == "max" else candidates(grid)
            error, octave = _least_of(values, counts, grid, top, octaves)
            if search == "mse":
                error, octave = _least_of(values, counts, grid, top, octave + FINE)
            found.append((error, len(found), grid, top * 2.0**octave))
        return [(grid, scale) for _, _, grid, scale in sorted(found)]


def _least_of(
    values: np.ndarray, counts: np.ndarray, grid: Grid, top: float, octaves: np.ndarray
) -> tuple[float, float]:
    errors = [
        float(np.dot(counts, np.square(grid.round(values, top * 2.0**octave) - values, dtype=np.float64)))
        for octave in octaves
    ]
    best = int(np.argmin(errors))
    return errors[best], float(octaves[best])
