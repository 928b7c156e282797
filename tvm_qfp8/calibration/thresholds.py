"""The magnitude that a layout's largest grid value stands for, by the rules that quantizers usually offer.

``max``: the largest one seen. ``percentile``: what 99.99 % of the nonzero values do not exceed. ``entropy``: that of
least Kullback-Leibler divergence between the distribution and its quantized version (Migacz, "8-bit Inference with
TensorRT", GTC 2017), here on the grid of a layout. All work on a histogram, so memory does not grow with the samples.
"""

from __future__ import annotations

import numpy as np

from tvm_qfp8.format import get_layout

METHODS = ("mse", "max", "percentile", "entropy")
PERCENTILE = 0.9999
_OCTAVES = 8
_STEPS_PER_OCTAVE = 8


def threshold(method: str, values: np.ndarray, counts: np.ndarray, layout: str) -> float:
    """The magnitude for sorted float magnitudes ``values`` that occur ``counts`` times; zeros need not be there."""
    largest = float(values[-1])
    if method == "max":
        return largest
    if method == "percentile":
        return float(values[np.searchsorted(np.cumsum(counts), PERCENTILE * counts.sum())])
    steps = np.arange(_OCTAVES * _STEPS_PER_OCTAVE) / _STEPS_PER_OCTAVE
    tried = largest * 2.0**-steps
    return float(tried[np.argmin([_divergence(values, counts, layout, t) for t in tried])])


def _divergence(values: np.ndarray, counts: np.ndarray, layout: str, largest: float) -> float:
    """Kullback-Leibler divergence of the clipped histogram from the one that spreads each grid cell's values evenly.

    What is clipped counts as the largest value that is not, in the first distribution only. Bins are as wide as
    their binade, so "evenly" means in proportion to it.
    """
    inside = int(np.searchsorted(values, largest, side="right"))
    if inside == 0:
        return float("inf")
    found = get_layout(layout)
    grid = found.grid[: found.magnitudes] * (largest / found.max_grid)
    cell = np.searchsorted((grid[1:] + grid[:-1]) / 2, values[:inside])
    width = 2.0 ** np.floor(np.log2(values[:inside]))
    mass = np.bincount(cell, counts[:inside])
    quantized = mass[cell] * width / np.bincount(cell, width)[cell]
    exact = counts[:inside].astype(np.float64)
    exact[-1] += counts[inside:].sum()
    exact, quantized = exact / exact.sum(), quantized / quantized.sum()
    return float(np.sum(exact * np.log(exact / quantized)))
