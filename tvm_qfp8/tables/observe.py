"""The error of a table as observed on float32 inputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SMALLEST_NORMAL = 2.0**-126


def sample_inputs(count: int, low: float = -np.inf, high: float = np.inf) -> np.ndarray:
    """About ``count`` float32 values in ``[low, high]``: half over all bit patterns, half where functions bend."""
    patterns = np.linspace(0, 2**32 - 1, count // 2).astype(np.uint32).view(np.float32)
    span = (max(low, -16.0), min(high, 16.0))
    dense = np.linspace(*span, count // 4) if span[0] < span[1] else np.linspace(low, high, count // 4)
    wide = np.linspace(max(low, -160.0), min(high, 160.0), count - count // 2 - count // 4)
    special = np.array([0.0, -0.0, np.inf, -np.inf, 2.0**-149, -(2.0**-149), 2.0**-126, low, high])
    x = np.concatenate(
        [patterns, dense.astype(np.float32), wide.astype(np.float32), special.astype(np.float32)]
    )
    return x[(x >= low) & (x <= high)]


def errors(y: np.ndarray, expected: np.ndarray, relative: bool) -> np.ndarray:
    """Error of float32 ``y`` against float64 ``expected`` in the sense of ``Table.max_error``.

    0 where ``y`` is the float32 nearest to the expected value (infinities and NaN too). A relative error is that of
    some real number which rounds to ``y``: half a denormal step is free, and infinity stands for 2**128 on.
    """
    with np.errstate(all="ignore"):
        y64 = np.where(np.isinf(y), np.copysign(np.float64(2.0**128), y), y.astype(np.float64))
        difference = np.abs(y64 - expected)
        if relative:
            denormal = np.abs(expected) < SMALLEST_NORMAL * 1.001
            difference = np.where(denormal, np.maximum(difference - 2.0**-150, 0.0), difference)
            error = difference / np.abs(expected)
        else:
            error = difference / np.maximum(1.0, np.abs(expected))
        nearest = expected.astype(np.float32)
        same = (y == nearest) | (np.isnan(y) & np.isnan(nearest))
    # What is neither equal nor comparable (NaN against a number) is an unbounded error.
    return np.where(same, 0.0, np.where(np.isfinite(error), error, np.inf))


def observe(
    table: Callable[[np.ndarray], np.ndarray],
    reference: Callable[[np.ndarray], np.ndarray],
    relative: bool,
    domain: tuple[float, float] = (-np.inf, np.inf),
    count: int = 100_000,
) -> float:
    """The largest error of ``table`` on :func:`sample_inputs`."""
    x = sample_inputs(count, *domain)
    with np.errstate(all="ignore"):
        return float(errors(table(x), reference(x.astype(np.float64)), relative).max())
