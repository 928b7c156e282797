"""How a linear layer is cut into products of tiles.

Byte layouts are multiplied as bytes into int32, other activations as two bytes where weights are bytes, or as bfloat16
into float32: integers below 2**24, exact in whatever order they are added. Where a whole sum could be larger (the
weights are constants and decide), it is taken in ``blocks`` that could not, and these are added as int32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tvm_qfp8.format import Layout
from tvm_qfp8.topi.amx.tiles import BFLOAT16, ROW_BYTES, ROWS, SIGNED, SUMS, UNSIGNED, TileKind, TileRegisters
from tvm_qfp8.topi.exact_sums import EXACT, are_exact, step_magnitudes
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import round_up

NEAR_ROW, FAR_ROW = 0.5, 1.5
"""Cycles that loading a row of a tile takes from the first and the second cache; multiplying by it takes one. Fitted:
so the order of blocks is about that of their times on the 3x3 layers of ResNet-18."""

BLOCK_CYCLES = 50
"""That a block of tiles takes besides, large or small; not searched."""

RESIDENT_BYTES = 24 * 1024
"""Half of these CPUs' first-level cache."""

LONG_ROW = 4
"""In cache lines."""

SCRATCH_BYTES = 512 * 1024
"""Operands of a block of rows: a quarter of these CPUs' second-level cache."""

STAYING_BYTES = 256 * 1024
"""Of weights that are read again at little cost: an eighth of the second-level cache."""

BLOCK_COST = 3
"""What it costs to add a block's sums to those of the blocks before it, in products."""

DECODE_COST = 0.22
"""What it costs to make a step of the reduction of 16 columns of weights bfloat16, in products: fitted to dense layers
of 49 to 784 rows."""

BYTE = 127
"""Largest magnitude of a signed byte, of either sign."""

BLOCK = 24
"""Most products of a block of the reduction."""


def tile_kinds(activation: Layout, weight: Layout) -> list[TileKind]:
    """Bytes where weights are signed bytes and activations bytes of either kind; else two bytes or bfloat16."""
    if weight.max_grid > BYTE:
        return [BFLOAT16]
    if not activation.signed and activation.max_grid <= 255:
        return [UNSIGNED]
    return [SIGNED] if activation.max_grid <= BYTE else [SIGNED, BFLOAT16]


def fits_tiles(isa: InstructionSet, operands: tuple[Layout | None, Layout | None], *extents: int) -> bool:
    """Whether the CPU has tile registers, both operands are codes, and no extent is 0."""
    return isa.tiles and None not in operands and 0 not in extents


@dataclass(frozen=True)
class TilePlan:
    """``runs`` stretches of ``run`` neighbouring activations make up a sum: one, or the rows of a window."""

    kind: TileKind
    rows: int
    """Rows of one tile of activations, at most 16."""
    row_tiles: int
    column_tiles: int
    run: int
    runs: int
    steps: int
    """Reduction steps of one product."""
    block: int
    """Products of one block of the reduction, whose sums are exact."""
    shift: int = 0
    """Where not 0, activations are multiplied in two parts, ``2**shift * high + low``, each in blocks of its own."""

    @property
    def parts(self) -> int:
        return 2 if self.shift else 1

    @property
    def decoded_parts(self) -> list[tuple[int, bool] | None]:
        """What ``decode_for_tiles`` makes of each activation."""
        return [(self.shift, True), (self.shift, False)] if self.shift else [None]

    @property
    def chunks(self) -> int:
        """Products of a run; the last may reach beyond it, where weights are zero."""
        return -(-self.run // self.steps)

    @property
    def real_products(self) -> int:
        return self.chunks * self.runs

    @property
    def blocks(self) -> int:
        return -(-self.real_products // self.block)

    @property
    def products(self) -> int:
        """With those beyond the last, which fill the last block; their weights are zero."""
        return self.blocks * self.block

    def cost(self, tiles: int) -> float:
        """Time of so many tiles of activations with one column of tiles of weights, in products."""
        passes = self.blocks * self.parts
        sums = self.real_products * self.parts + (BLOCK_COST * passes if passes > 1 else 0)
        return tiles * sums + (DECODE_COST * self.run * self.runs if self.kind is BFLOAT16 else 0)

    @property
    def registers(self) -> TileRegisters:
        return TileRegisters(self.kind, self.rows, self.row_tiles, self.column_tiles, self.steps)


def shares_rows(weight_bytes: int, activation_bytes: int) -> bool:
    """Whether threads share a layer's rows, each reading all weights, and not its weights, each reading all rows."""
    return weight_bytes <= max(STAYING_BYTES, activation_bytes)


def plan_tiles(
    codes: np.ndarray, layouts: tuple[Layout, Layout], row_length: int, repeats: int = 1, groups: int = 1
) -> TilePlan:
    """The plan of least time for weight ``codes`` ``(columns, runs, run)``, those of all groups.

    ``row_length`` rows of activations are at equal distances: all of a dense layer, or a row of pixels of a
    convolution, of which there are ``repeats``.
    """
    plans = [plan_kind(kind, codes, layouts, row_length, repeats, groups) for kind in tile_kinds(*layouts)]
    return min(plans, key=lambda plan: plan.cost(-(-row_length // ROWS) * repeats))


def plan_kind(
    kind: TileKind,
    codes: np.ndarray,
    layouts: tuple[Layout, Layout],
    row_length: int,
    repeats: int,
    groups: int = 1,
) -> TilePlan:
    """The same for one kind of products."""
    _, runs, run = codes.shape
    chunks = -(-run // kind.most)
    steps = round_up(-(-run // chunks), 4)
    padded = np.zeros((len(codes), runs, chunks * steps), codes.dtype)
    padded[:, :, :run] = codes
    flat = padded.reshape(len(codes), -1)
    products = runs * chunks
    activation, weight = layouts
    block, shift = -(-products // -(-products // BLOCK)), 0
    if kind is SIGNED:
        shift = byte_shift(activation)
    elif kind is BFLOAT16:
        magnitudes = step_magnitudes(flat, weight, steps)
        block, shift = exact_blocks(
            products, activation, lambda count, largest: are_exact(magnitudes, count, (EXACT - 1) // largest)
        )
    tiles = -(-row_length // ROWS)
    rows = -(-row_length // tiles)
    column_bytes = block * steps * ROWS * kind.element_bytes
    row_tiles, column_tiles = best_block(
        (tiles * repeats, -(-len(codes) // (groups * ROWS))), rows, block, column_bytes
    )
    return TilePlan(kind, rows, row_tiles, column_tiles, run, runs, steps, block, shift)


def scratch_row(elements: int, kind: TileKind) -> int:
    """Elements from one row of operands to the next.

    Long rows start an odd number of cache lines apart, so that those of a tile lie in different sets of the cache.
    """
    lines = elements * kind.element_bytes / ROW_BYTES
    return elements if lines < LONG_ROW else (math.ceil(lines) | 1) * kind.most


def exact_blocks(products: int, activation: Layout, exact: Callable[[int, int], bool]) -> tuple[int, int]:
    """(products of a block, shift of the activations' parts) of least time.

    ``exact(count, largest)`` tells whether sums of ``count`` products are, of activations up to ``largest``.
    """

    def block(largest: int) -> int:
        """The longest block that is exact; 0 where not even one product is."""
        for blocks in range(-(-products // BLOCK), products + 1):
            if exact(-(-products // blocks), largest):
                return -(-products // blocks)
        return 0

    def cost(parts: int, count: int) -> float:
        return parts * (products + BLOCK_COST * -(-products // count)) if count else math.inf

    shift = activation.max_grid.bit_length() // 2
    largest = max(int(np.abs(part(activation.grid, shift, high)).max()) for high in (True, False))
    whole, split = block(activation.max_grid), block(largest)
    assert split, "parts of every layout are small enough"
    return (whole, 0) if cost(1, whole) <= cost(2, split) else (split, shift)


def byte_shift(activation: Layout) -> int:
    """The shift of an activation's parts that fit signed bytes; 0 where the whole does."""
    grid = activation.grid
    return next(s for s in range(8) if np.abs(part(grid, s, True)).max(initial=0) <= BYTE)


def part(grid: np.ndarray, shift: int, high: bool) -> np.ndarray:
    """The high or low part of grid values, ``grid = 2**shift * high + low``, the high one rounded to nearest."""
    magnitude = np.abs(grid.astype(np.int64))
    upper = (magnitude + (1 << shift >> 1)) >> shift
    return np.sign(grid) * (upper if high else magnitude - (upper << shift))


def best_block(tiles: tuple[int, int], rows: int, products: int, column_bytes: int) -> tuple[int, int]:
    """(rows, columns) of the block of tiles that covers a matrix of tiles in least time.

    Parameters
    ----------
    tiles : (rows, columns)
        Of the matrix.
    rows : int
        Of one tile of activations.
    products : int
        Of a block of the reduction.
    column_bytes : int
        Of the weights that one column of tiles meets in them.
    """
    row_tiles, column_tiles = tiles

    def cost(block: tuple[int, int]) -> float:
        high, wide = block
        blocks = -(-row_tiles // high) * -(-column_tiles // wide)
        # Weights stay for the next block of rows, in the first cache if they fit; activations come from the second.
        weights = NEAR_ROW if wide * column_bytes <= RESIDENT_BYTES else FAR_ROW
        loads = high * rows * FAR_ROW + wide * ROWS * weights
        return blocks * (products * max(high * wide * rows, loads) + BLOCK_CYCLES)

    blocks = [(r, c) for r in range(1, SUMS + 1) for c in range(1, SUMS // r + 1)]
    return min(blocks, key=lambda block: (cost(block), abs(block[0] - block[1])))
