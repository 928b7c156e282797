"""Convolutions by Winograd's algorithm: which can take it, in which tiles, and how filters are packed.

With dilation d a filter reads every d-th row and column: d x d smaller images, its phases, none of which it mixes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from tvm_qfp8.format import Layout, decode_grid
from tvm_qfp8.topi.conv2d import ConvShape
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import CHANNEL_PADDING, pack_panels, round_up
from tvm_qfp8.topi.winograd_tiling import F2, F4, FILTER, Tiling

TAPS = FILTER**2
LEAST_CHANNELS = 6
"""With fewer channels in a part the transforms cost more than the products they save; twice as many where the pixels of
a row lie apart."""
MARGIN = 1.35
"""So many times more time for its multiply-adds must the direct form need where it multiplies bytes."""
CACHED_BYTES = 5 << 20
"""Transformed filters of more bytes come from main memory."""
FETCH_INSTRUCTIONS = 0.375
"""Reading a value from there takes the time of so many instructions that multiply."""
MANY_TILES = 1000
LOOP_INSTRUCTIONS = 1.5
"""Of a reduction step, beside its multiply-adds."""
FILTER_LOAD = 1.0
"""Loading a vector of transformed filters, which the nearest cache does not hold, takes so many multiply-adds."""
MOST_PARTS = 8
"""Beyond so many parts of the channels their separate inverse transforms cost more than is saved."""


@dataclass(frozen=True)
class WinogradPlan:
    """A convolution by Winograd's algorithm, its channels summed in ``parts`` whose sums are found exactly."""

    shape: ConvShape
    tiling: Tiling
    parts: int

    @property
    def phases(self) -> int:
        """Images whose pixels no filter mixes with those of another, in one image."""
        return math.prod(self.shape.dilation)

    @property
    def phase_width(self) -> int:
        """Outputs in a row of the widest phase."""
        return -(-self.shape.out_width // self.shape.dilation[1])

    @property
    def tiles_high(self) -> int:
        """Tiles in a column of a phase's outputs; the last one overlaps where the height is not a multiple."""
        return -(-self.shape.out_height // (self.shape.dilation[0] * self.tiling.outputs))

    @property
    def tiles_wide(self) -> int:
        return -(-self.phase_width // self.tiling.outputs)

    @property
    def tile_rows(self) -> int:
        """Of the whole batch."""
        return self.shape.batch * self.phases * self.tiles_high

    @property
    def tiles(self) -> int:
        return self.tile_rows * self.tiles_wide

    def cost(self, rate: float) -> float:
        """Of an output channel, in instructions that multiply ``rate`` values."""
        values = self.tiling.positions * self.shape.channels
        from_memory = 2 * values * self.shape.out_channels > CACHED_BYTES
        return values * max(self.tiles / rate, FETCH_INSTRUCTIONS if from_memory else 0)

    def depth(self, isa: InstructionSet) -> int:
        """Channels, padded so that all parts are equal and whole multiply-adds."""
        return round_up(self.shape.channels, isa.pair * self.parts)

    def vectors(self, isa: InstructionSet) -> int:
        """Vectors of output channels whose products are summed at once.

        They do not depend on the number of tiles: a module for several sizes of images shares filters.
        """
        return _unspared(isa).tile(MANY_TILES, self.shape.out_channels, weight_load=FILTER_LOAD)[1]

    def tiles_at_once(self, isa: InstructionSet, group: int) -> int:
        """Of a group of tiles, those whose products at one position are summed at once."""
        vectors = self.vectors(isa)
        fitting = [tiles for tiles in range(1, group + 1) if _unspared(isa).fits(tiles, vectors)]

        def cost(tiles: int) -> float:
            return -(-group // tiles) * (tiles * vectors + FILTER_LOAD * vectors + LOOP_INSTRUCTIONS)

        return min(fitting, key=cost)

    def filter_values(self, isa: InstructionSet) -> int:
        """Number of transformed filter values, int16."""
        width = self.vectors(isa) * isa.lanes
        return round_up(self.shape.out_channels, width) * self.tiling.positions * self.depth(isa)

    def input_offsets(self) -> np.ndarray:
        """What transformed inputs are stored less, ``(window, window)``."""
        offsets = self.tiling.offsets(self.shape.layouts()[0])
        assert offsets is not None
        return offsets

    def offset_of_position(self) -> dict[int, int]:
        """The same for each position where there is one, counted row by row."""
        offsets = enumerate(self.input_offsets().reshape(-1))
        return {position: int(offset) for position, offset in offsets if offset != 0}


def _unspared(isa: InstructionSet) -> InstructionSet:
    """No register is spared for an epilogue: products go to memory first."""
    return replace(isa, spare=0)


def plan_winograd(
    shape: ConvShape, codes: np.ndarray, rate: float, direct_rate: float
) -> WinogradPlan | None:
    """The fastest way to compute a convolution of OHWI ``codes`` by Winograd's algorithm.

    None where the direct form is faster. An instruction multiplies ``rate`` grid values, or ``direct_rate`` in the
    direct form.
    """
    plans = [plan for tiling in (F2, F4) if (plan := plan_tiling(tiling, shape, codes)) is not None]
    best = min(plans, key=lambda plan: plan.cost(rate), default=None)
    return best if best is not None and is_faster(best, rate, direct_rate) else None


def plan_tiling(tiling: Tiling, shape: ConvShape, codes: np.ndarray) -> WinogradPlan | None:
    """The same with this tiling; None where it cannot be."""
    ones = shape.stride == shape.input_dilation == (1, 1)
    if shape.kernel != (FILTER, FILTER) or not ones or shape.groups != 1 or shape.activation is None:
        return None
    if min(shape.out_height // shape.dilation[0], shape.out_width // shape.dilation[1]) < tiling.outputs:
        return None
    activation, weight = shape.layouts()
    if tiling.offsets(activation) is None or not tiling.filters_fit(weight):
        return None
    parts = _exact_parts(tiling, activation, weight, codes)
    return WinogradPlan(shape, tiling, parts) if parts else None


def is_faster(plan: WinogradPlan, rate: float, direct_rate: float) -> bool:
    """Whether it beats the direct form, which ``scripts/bench_winograd.py`` measures on both sides of this line."""
    shape, times = plan.shape, direct_rate / rate
    direct = shape.batch * shape.out_height * shape.out_width * TAPS * shape.channels / direct_rate
    apart = 2 if plan.phases > 1 else 1
    enough = shape.channels >= LEAST_CHANNELS * apart * plan.parts * times
    return enough and plan.cost(rate) * (MARGIN if times > 1 else 1) < direct


def _exact_parts(tiling: Tiling, activation: Layout, weight: Layout, codes: np.ndarray) -> int | None:
    """The least number of channel parts whose sums are all within what the tiling finds exactly."""
    grid = decode_grid(codes, weight).astype(np.int64)
    positive, negative = (np.maximum(sign * grid, 0).sum((1, 2)) * activation.max_grid for sign in (1, -1))
    bounds = [positive + negative] if activation.signed else [positive, negative]
    for parts in range(1, min(MOST_PARTS, grid.shape[3]) + 1):
        # Parts as the kernel cuts them, for any width of its multiply-add (1 or 2 channels).
        sizes = {round_up(grid.shape[3], pair * parts) // parts for pair in (1, 2)}
        if max(_part_sums(bound, size) for bound in bounds for size in sizes) < tiling.limit:
            return parts
    return None


def _part_sums(sums: np.ndarray, size: int) -> int:
    starts = np.arange(0, sums.shape[1], size)
    return int(np.add.reduceat(sums, starts, axis=1).max())


def pack_winograd_weights(isa: InstructionSet, plan: WinogradPlan, codes: np.ndarray) -> np.ndarray:
    """Codes OHWI -> panels ``(panels, 9, depth / pair, width, pair)``; the kernel transforms them once."""
    depth = plan.depth(isa)
    padded = np.pad(codes, ((0, 0), (0, 0), (0, 0), (0, depth - codes.shape[3])))
    return pack_panels(padded.reshape(len(codes), -1), plan.vectors(isa) * isa.lanes, isa.pair)


def offset_products(isa: InstructionSet, plan: WinogradPlan, codes: np.ndarray) -> np.ndarray:
    """What offsets take from sums, int32 modulo 2^32 ``(parts, positions with an offset, channels)``.

    Channels are padded as in ``pad_channels``.
    """
    grid = decode_grid(codes, plan.shape.layouts()[1]).astype(np.int64).transpose(0, 3, 1, 2)
    offsets = plan.input_offsets().reshape(-1)
    used = np.flatnonzero(offsets)
    filters = plan.tiling.transform_filters(grid).reshape(*grid.shape[:2], -1)[..., used] * offsets[used]
    size = plan.depth(isa) // plan.parts
    parts = [filters[:, part * size : (part + 1) * size].sum(axis=1).T for part in range(plan.parts)]
    return np.pad(np.stack(parts), ((0, 0), (0, 0), (0, CHANNEL_PADDING))).astype(np.int32)
