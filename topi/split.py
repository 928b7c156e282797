"""Grid values as sums of int8 parts, for instruction sets whose widest multiply-add takes bytes.

With a base ``B = 2**s`` every magnitude is ``|G| = B * h + r``, ``h`` rounded to nearest; the signs of both are that of
``G``. Large grid values are multiples of large steps, so ``r`` is zero where ``h`` is large, and ``h``, ``r`` and
``h + r`` all fit int8. A product then takes three byte products instead of one of int16 (Karatsuba and Ofman, 1962)::

    G G' = B (B - 1) h h' + B (h + r)(h' + r') - (B - 1) r r'

and two where one operand fits int8 as it is, as E1M6 does: ``G G' = B G h' + G r'``. Linear layouts on both sides take
one: the activation as a byte, which an offset brings into the range that the multiply-add takes, and ``offset`` times
the weights' sum, known before, is taken off.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from tvm import tirx

from tvm_qfp8.format import Layout
from tvm_qfp8.topi.float_contract import bind

WHOLE, HIGH, LOW, SUM = "whole", "high", "low", "sum"

MOST_BITS = 6
"""Bases up to 64: from there on ``r`` alone has as many values as the finest grid."""


@dataclass(frozen=True)
class Split:
    """Which parts are multiplied; product ``p`` is the sum of ``activation[p] * weight[p]``."""

    bits: int
    """``s``, the base is ``2**s``."""
    activation: tuple[str, ...]
    weight: tuple[str, ...]
    factors: tuple[int, ...]
    """The dot product is the sum of factor times product."""
    offset: int = 0
    """Added to every activation; only where there is one product."""

    @property
    def weights_ready(self) -> bool:
        """Weights are stored as the bytes that are multiplied, with nothing to decode."""
        return self.weight == (WHOLE,)

    def takes_codes(self, activation: Layout) -> bool:
        """Codes of ``activation`` are the bytes that are multiplied."""
        return self.activation == (WHOLE,) and not self.offset and not activation.signed

    @property
    def products(self) -> int:
        return len(self.factors)

    @property
    def activation_parts(self) -> tuple[str, ...]:
        """Each part of the activation once, in the order of first use."""
        return tuple(dict.fromkeys(self.activation))

    def activation_part(self, product: int) -> int:
        """Which of ``activation_parts`` a product takes."""
        return self.activation_parts.index(self.activation[product])

    def part(self, name: str, grid: np.ndarray) -> np.ndarray:
        """The part of integer grid values, int64."""
        values = np.asarray(grid, np.int64)
        if name == WHOLE:
            return values
        high = np.sign(values) * ((np.abs(values) + (1 << self.bits >> 1)) >> self.bits)
        low = values - (high << self.bits)
        return {HIGH: high, LOW: low, SUM: high + low}[name]

    def combine(self, products: list):
        """The dot product of int32 vectors of products."""
        terms = [
            value if factor == 1 else value * tirx.const(factor, value.ty.dtype)
            for factor, value in zip(self.factors, products, strict=True)
        ]
        return bind(functools.reduce(lambda a, b: a + b, terms))

    def largest_sum(self, weight_grid: np.ndarray, activation: Layout) -> int:
        """Bound on every partial sum, as in ``overflow.py``; ``weight_grid`` is ``(out_channels, ...)``."""
        flat = weight_grid.reshape(len(weight_grid), -1)
        total = np.zeros(len(weight_grid), np.int64)
        for factor, x, w in zip(self.factors, self.activation, self.weight, strict=True):
            largest = int(np.abs(self.part(x, activation.grid)).max()) + 2 * abs(self.offset)
            total += abs(factor) * largest * np.abs(self.part(w, flat)).sum(axis=1)
        return int(total.max(initial=0))


@functools.cache
def split_of(
    activation: Layout, weight: Layout, unsigned: bool = False, one_product: bool = False
) -> Split | None:
    """The split of fewest products; None where only more than one would do and ``one_product`` is asked for.

    ``unsigned``: the multiply-add takes activations of 0 to 255 instead of -128 to 127.
    """
    whole = [layout.max_grid <= 127 for layout in (activation, weight)]
    if whole[1] and activation.max_grid - int(activation.grid.min()) <= 255:
        lowest = -128 if activation.signed else 0
        return Split(0, (WHOLE,), (WHOLE,), (1,), offset=(0 if unsigned else -128) - lowest)
    if one_product:
        return None
    for bits in range(1, MOST_BITS + 1):
        base = 1 << bits
        if whole[0]:
            found = Split(bits, (WHOLE, WHOLE), (HIGH, LOW), (base, 1))
        elif whole[1]:
            found = Split(bits, (HIGH, LOW), (WHOLE, WHOLE), (base, 1))
        else:
            parts = (HIGH, SUM, LOW)
            found = Split(bits, parts, parts, (base * (base - 1), base, 1 - base))
        if _fits(found, found.activation, activation) and _fits(found, found.weight, weight):
            return found
    raise ValueError(f"{activation.name} times {weight.name} has no int8 parts")


def _fits(split: Split, parts: tuple[str, ...], layout: Layout) -> bool:
    values = np.concatenate([split.part(name, layout.grid) for name in parts])
    return bool(values.min() >= -128 and values.max() <= 127)
