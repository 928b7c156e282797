"""Winograd F(2x2, 3x3) on grid values: which convolutions can take it, how filters are packed, when it is faster.

Two neighbouring outputs in each direction share a window of 4 x 4 inputs (Lavin and Gray, 2015, section 4.1).
With the filter transform doubled in each direction, ``G`` below, every number is an integer and the result is
exactly four times the convolution::

    V = B^T d B        U = G g G^T        4 y = A^T [U * V summed over channels] A

For E2M5 filters |U| <= 9 * 252, and |V| <= 4 * max |G_x| <= 16128: both fit int16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tvm_qfp8.format import Layout, decode_grid
from tvm_qfp8.topi.conv2d import ConvShape
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.overflow import INT32_LIMIT
from tvm_qfp8.topi.panels import pack_panels, round_up

B_T = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
G = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]])
A_T = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])
POSITIONS = 16
TAPS = 9
PRODUCT_BYTES = 16 * 1024
"""Products of one register tile at all positions: half a first-level cache."""
LEAST_CHANNELS = 8
"""With fewer channels in a part the transforms cost more than the products they save."""
MOST_PARTS = 8
"""Beyond so many parts of the channels their separate inverse transforms cost more than is saved."""


@dataclass(frozen=True)
class WinogradPlan:
    """A convolution by Winograd's algorithm, its channels summed in ``parts`` that cannot overflow."""

    shape: ConvShape
    parts: int

    @property
    def tiles_high(self) -> int:
        """Output tiles of 2 x 2 in a column; the last one overlaps where the height is odd."""
        return -(-self.shape.out_height // 2)

    @property
    def tiles_wide(self) -> int:
        return -(-self.shape.out_width // 2)

    def depth(self, isa: InstructionSet) -> int:
        """Channels, padded so that all parts are equal and whole multiply-adds."""
        return round_up(self.shape.channels, isa.pair * self.parts)

    def tile(self, isa: InstructionSet) -> tuple[int, int]:
        """(tiles, vectors) of the register tile."""
        accumulators = PRODUCT_BYTES // (POSITIONS * 4 * isa.lanes)
        smaller = replace(isa, registers=min(isa.registers, accumulators + 3 + isa.temporaries))
        return smaller.tile(self.shape.batch * self.tiles_high * self.tiles_wide, self.shape.out_channels)

    def filter_values(self, isa: InstructionSet) -> int:
        """Number of transformed filter values, int16."""
        width = self.tile(isa)[1] * isa.lanes
        return round_up(self.shape.out_channels, width) * POSITIONS * self.depth(isa)


def plan_winograd(shape: ConvShape, codes: np.ndarray) -> WinogradPlan | None:
    """How to compute a convolution of OHWI ``codes`` by Winograd's algorithm; None where it cannot be."""
    ones = shape.stride == shape.dilation == shape.input_dilation == (1, 1)
    if shape.kernel != (3, 3) or not ones or shape.groups != 1:
        return None
    if shape.activation is None or min(shape.out_height, shape.out_width) < 2:
        return None
    activation, weight = shape.layouts()
    if TAPS * weight.max_grid >= 2**15 or 4 * activation.max_grid >= 2**15:
        return None
    parts = _safe_parts(activation, weight, codes)
    return WinogradPlan(shape, parts) if parts else None


def winograd_is_faster(plan: WinogradPlan) -> bool:
    """Whether it beats the direct form, which ``scripts/bench_winograd.py`` measures on both sides of this line."""
    return plan.shape.channels >= LEAST_CHANNELS * plan.parts


def transform_filters(grid: np.ndarray) -> np.ndarray:
    """``(..., 3, 3)`` grid values -> ``(..., 4, 4)``, four times Lavin and Gray's."""
    return G @ grid @ G.T


def largest_inputs(layout: Layout) -> np.ndarray:
    """Bound on \\|V\\| at each position, ``(4, 4)``: an unsigned layout's terms of one sign only add up."""
    plus, minus = np.maximum(B_T, 0).sum(1), np.maximum(-B_T, 0).sum(1)
    positive = np.outer(plus, plus) + np.outer(minus, minus)
    negative = np.outer(plus, minus) + np.outer(minus, plus)
    terms = positive + negative if layout.signed else np.maximum(positive, negative)
    return terms * layout.max_grid


def _safe_parts(activation: Layout, weight: Layout, codes: np.ndarray) -> int | None:
    """The least number of channel parts in which no sum at a position, nor of the inverse transform, overflows."""
    grid = decode_grid(codes, weight).astype(np.int64)
    products = np.abs(transform_filters(grid.transpose(0, 3, 1, 2))) * largest_inputs(activation)
    # An output adds a position at most once, so the sum of the bounds of its positions bounds every partial sum.
    used = np.abs(A_T)
    outputs = np.einsum("ai,ocij,bj->ocab", used, products, used).max(axis=(2, 3))
    channels = outputs.shape[1]
    for parts in range(1, min(MOST_PARTS, channels) + 1):
        # Parts as the kernel cuts them, for any width of its multiply-add (1 or 2 channels).
        sums = [_part_sums(outputs, round_up(channels, pair * parts) // parts) for pair in (1, 2)]
        if max(sums) < INT32_LIMIT:
            return parts
    return None


def _part_sums(outputs: np.ndarray, size: int) -> int:
    starts = np.arange(0, outputs.shape[1], size)
    return int(np.add.reduceat(outputs, starts, axis=1).max())


def pack_winograd_weights(isa: InstructionSet, plan: WinogradPlan, codes: np.ndarray) -> np.ndarray:
    """Codes OHWI -> panels ``(panels, 9, depth / pair, width, pair)``; the kernel transforms them once."""
    _, vectors = plan.tile(isa)
    depth = plan.depth(isa)
    padded = np.pad(codes, ((0, 0), (0, 0), (0, 0), (0, depth - codes.shape[3])))
    return pack_panels(padded.reshape(len(codes), -1), vectors * isa.lanes, isa.pair)
