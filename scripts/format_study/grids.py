"""The numbers that each 8-bit format can store, and rounding to them.

Sources: float8 types of ml_dtypes (finite values); posit (es 0, 1): Gustafson and Yonemoto, "Beating Floating Point at
its Own Game" (2017); NF8: quantiles of the normal distribution as NF4's, Dettmers et al., "QLoRA" (2023), appendix E.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import ml_dtypes
import numpy as np

from tvm_qfp8.format import get_layout

_DROPPED_BITS = 14
"""Of a float32. What is left, sign, exponent and 9 bits of mantissa, tells on which side of a midpoint of any of these
grids a value lies (the code book's apart, whose midpoints move by at most 2^-10 of themselves)."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Sorted distinct float64 ``levels`` of a format at scale 1.

    ``headroom`` is how many octaves above the scale that puts the largest value on the largest level the best scale may
    lie: many for posits, whose precision is greatest around 1.
    """

    name: str
    levels: np.ndarray
    headroom: int = 1

    @property
    def signed(self) -> bool:
        """Whether it holds negative numbers."""
        return bool(self.levels[0] < 0)

    @property
    def top(self) -> float:
        """The largest level."""
        return float(self.levels[-1])

    @cached_property
    def _nearest(self) -> np.ndarray:
        """Level for every pattern of the leading bits of a float32."""
        patterns = np.arange(1 << (32 - _DROPPED_BITS), dtype=np.uint32)
        middle = ((patterns << _DROPPED_BITS) + (1 << (_DROPPED_BITS - 1))).astype(np.uint32)
        values = np.clip(np.nan_to_num(middle.view(np.float32)), self.levels[0], self.levels[-1])
        midpoints = (self.levels[1:] + self.levels[:-1]) / 2
        return self.levels[np.searchsorted(midpoints, values)].astype(np.float32)

    def round(self, x: np.ndarray, scale: float | np.ndarray) -> np.ndarray:
        """float32 ``x`` rounded to ``level * scale``; ``scale`` broadcasts."""
        scale32 = np.asarray(scale, np.float32)
        bits = np.ascontiguousarray(x / scale32, np.float32).view(np.uint32) >> _DROPPED_BITS
        return np.asarray(self._nearest.take(bits.astype(np.intp)) * scale32)


def _posit(es: int) -> np.ndarray:
    """Non-negative 8-bit posits of ``es`` exponent bits."""
    values = [0.0]
    for code in range(1, 128):
        bits = f"{code:07b}"
        run = len(bits) - len(bits.lstrip(bits[0]))
        regime = run - 1 if bits[0] == "1" else -run
        rest = bits[run + 1 :]
        exponent = int(rest[:es].ljust(es, "0"), 2) if es else 0
        fraction = rest[es:]
        mantissa = 1 + (int(fraction, 2) / 2 ** len(fraction) if fraction else 0)
        values.append(mantissa * 2.0 ** (regime * 2**es + exponent))
    return np.array(values)


def _normal_float() -> np.ndarray:
    offset = 1 - (1 / 512 + 1 / 510) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(offset, 0.5, 129)[:-1]]
    negative = [-quantile(p) for p in np.linspace(offset, 0.5, 128)[:-1]]
    levels = np.array(sorted([*negative, 0.0, *positive]))
    return levels / levels.max()


def _symmetric(magnitude: np.ndarray) -> np.ndarray:
    return np.unique(np.concatenate([-magnitude, magnitude]) + 0.0)


def _float8(dtype: type) -> np.ndarray:
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values)] + 0.0)


def _qfp8(name: str) -> Grid:
    return Grid(f"QFP8 {name}", np.unique(get_layout(name).grid).astype(np.float64))


_QFP8 = ("E1M6", "E2M5", "E3M4", "UE1M7", "UE2M6", "UE3M5")
GRIDS = {
    "int8": Grid("int8", np.arange(-127.0, 128)),
    "uint8": Grid("uint8", np.arange(256.0)),
    "E4M3": Grid("E4M3", _float8(ml_dtypes.float8_e4m3fn)),
    "E5M2": Grid("E5M2", _float8(ml_dtypes.float8_e5m2)),
    "E3M4": Grid("E3M4", _float8(ml_dtypes.float8_e3m4)),
    **{
        f"posit8 es {es}": Grid(f"posit8 es {es}", _symmetric(_posit(es)), math.ceil(6 * 2**es) + 1)
        for es in (0, 1)
    },
    "NF8": Grid("NF8", _normal_float()),
    **{f"QFP8 {name}": _qfp8(name) for name in _QFP8},
}
