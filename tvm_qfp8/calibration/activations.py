"""Statistics of one activation tensor over all samples, and the layout and scale chosen from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tvm_qfp8.format import get_layout
from tvm_qfp8.quantize import select_activation

LAYOUTS = ("E2M5", "E3M4", "UE2M6", "UE3M5")
_SUBSAMPLE = 1 << 16  # values kept of a tensor: select_activation's limit
_MASK = 1000.0  # nothing smaller than this is taken for a mask


@dataclass(frozen=True)
class Choice:
    """Layout and float32 scale of an activation, or None for both: it stays float32 and ``note`` says why."""

    layout: str | None
    scale: float | None
    note: str = ""


class Observer:
    """Collects range and a bounded random subsample of a tensor, one sample at a time.

    Parameters
    ----------
    samples : int
        How many times ``record`` will be called.
    seed : int
        Makes the subsample reproducible.
    """

    def __init__(self, samples: int, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._each = -(-_SUBSAMPLE // samples)
        self._kept: list[np.ndarray] = []
        self._room = _SUBSAMPLE
        self.lows: list[float] = []
        self.highs: list[float] = []

    def record(self, value: np.ndarray, tokens: np.ndarray | None = None) -> None:
        """Add one sample's tensor; ``tokens`` picks the rows that the subsample is drawn from."""
        self.lows.append(float(value.min()))
        self.highs.append(float(value.max()))
        flat = np.ascontiguousarray(value if tokens is None else _rows(value)[tokens]).reshape(-1)
        wanted = min(self._each, self._room)
        if flat.size > wanted:
            flat = flat[self._random.integers(0, flat.size, wanted)]
        self._kept.append(flat.astype(np.float32))
        self._room -= flat.size

    def choose(self, layouts: Sequence[str] = LAYOUTS) -> Choice:
        """Layout and scale of least squared error on the subsample.

        Unsigned layouts take part only if no value of any sample was negative. A tensor with values that no
        layout can hold together with the rest (see ``_bulk_limit``), as a mask of -10000 makes them, gets no
        layout: least squares would round the rest to nothing, dropping the large values would clip a signal
        a thousand times the rest, and a float32 activation with an 8-bit weight does neither.
        """
        if not math.isfinite(sum(self.lows) + sum(self.highs)):
            return Choice(None, None, "the activation holds NaN or infinity")
        allowed = [name for name in layouts if get_layout(name).signed or min(self.lows) >= 0]
        if not allowed:
            return Choice(None, None, f"negative values, and no signed layout among {', '.join(layouts)}")
        values = np.concatenate(self._kept)
        extremes = np.array(self.lows + self.highs, np.float32)
        widest = max(get_layout(name).max_grid for name in allowed)
        limit = _bulk_limit(np.concatenate([values, extremes]), widest)
        if limit is not None:
            found = f"values up to {np.abs(extremes).max():.4g} beside a bulk within {limit:.4g}"
            return Choice(None, None, f"no 8-bit layout holds {found} (a mask?)")
        if not values.any():
            return Choice(allowed[0], 1.0)
        layout, scale = select_activation(values, layouts=tuple(allowed))
        return Choice(layout, float(scale))


def _rows(value: np.ndarray) -> np.ndarray:
    return value.reshape(-1, value.shape[-1])


def _bulk_limit(values: np.ndarray, widest: int) -> float | None:
    """Largest magnitude of the bulk if a gap parts it from values no layout can hold with it, else None.

    A mask (-10000 added where a token is missing) is the usual cause. ``widest`` is the largest grid value
    of the layouts at hand: with the large values at the top of the grid, everything below 1/widest of them
    has less than one step, so a bulk beyond a gap of widest / 8 keeps under 3 bits. The large values must
    be at least 1000, as masks are (probabilities and gates have such gaps, but below 1), and the bulk
    must be more than 1 % of the values that are not zero.
    """
    magnitudes = np.sort(np.abs(values[values != 0]).astype(np.float64))
    if len(magnitudes) < 2 or magnitudes[-1] < _MASK:
        return None
    below, above = magnitudes[:-1], magnitudes[1:]
    gap = (above >= _MASK) & (above > below * (widest / 8))
    gap[: len(magnitudes) // 100] = False
    places = np.flatnonzero(gap)
    return float(below[places[0]]) if len(places) else None
