"""What may be decided about a kernel without changing its result: one dataclass for each kernel family.

The kernels' loops are templates over these decisions. ``default`` is a good guess from the instruction set and the
shape; ``space`` lists the values worth trying, each decision a name and its candidates as integers, which is what
MetaSchedule samples (``tvm_qfp8/tuning``). Weights are packed in the order in which a schedule reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tvm_qfp8.format import Layout
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.sharing import favours_rows

if TYPE_CHECKING:
    from tvm_qfp8.topi.batch_matmul import BatchMatmulShape
    from tvm_qfp8.topi.conv2d import ConvShape
    from tvm_qfp8.topi.gemm import GemmShape

SCRATCH_BYTES = 384 * 1024
"""Decoded activations of one block: they should stay in the second-level cache."""

SLAB_BYTES = 128 * 1024
"""The same for one vector of channels of a depthwise convolution."""

REGISTER_DECODE_ROWS = 6
"""Up to so many rows weights are decoded in registers instead of through a scratch panel."""

MOST_IMAGE_CHANNELS = 4
IMAGE_TILE = 4, 1
"""(rows, vectors) for convolutions of so few channels with AVX-512: their pixels' addresses take registers, too. A tile
that fills the registers takes twice as long there (tuning_logs, "conv2d 224x224x3")."""

_TILE = 8
"""A register tile is one decision: ``rows * 8 + vectors``, since only some pairs fit the registers."""

REVISION = 2
"""To be raised when the kernels change so much that old measurements no longer compare."""

SHARING = ("parallel_rows",)
"""Decisions on how threads share the work."""

RETIRED = ("prefetch",)
"""Decisions of older logs that are none any more. Fetching weights ahead gains only where they are not in cache, as in
a whole network; timed alone, a kernel has them there."""

Decisions = dict[str, int]
Space = dict[str, tuple[int, ...]]


def _tiles(isa: InstructionSet, rows: int, columns: int, limit: int = 14) -> set[int]:
    """Register tiles that fit the registers."""
    widest = min(4, -(-columns // isa.lanes))
    return {
        tile_rows * _TILE + vectors
        for vectors in range(1, widest + 1)
        for tile_rows in range(isa.row_group, min(rows, limit) + 1, isa.row_group)
        if isa.fits(tile_rows, vectors)
        # Tiles of few accumulators cannot hide the latency of a multiply-add.
        if tile_rows * vectors >= min(4, rows * widest)
    }


def _decodes(isa: InstructionSet, weight: Layout | None) -> bool:
    """Whether a thread decodes the weights that it multiplies by."""
    return weight is not None and not isa.weights_in_place


def _with_default(default: Decisions, candidates: dict[str, set[int]]) -> Space:
    """Sorted candidates, the default's among them."""
    return {name: tuple(sorted(candidates[name] | {value})) for name, value in default.items()}


@dataclass(frozen=True)
class GemmSchedule:
    """Dense layers and 1x1 convolutions."""

    tile_rows: int
    vectors: int
    """Vectors of output channels in a panel: how the weights are packed."""
    scratch_bytes: int
    """Decoded activations of one block of rows, at most about so many."""
    register_decode: bool
    """Weights are decoded in registers, not through a scratch panel."""
    rows_outer: bool
    """Tiles of rows outside, panels inside (with ``register_decode`` only)."""
    unroll: int
    """Reduction steps written out in the loop."""
    parallel_rows: bool
    """Threads share blocks of rows, else panels."""

    @classmethod
    def default(cls, isa: InstructionSet, shape: GemmShape, threads: int) -> GemmSchedule:
        few = shape.rows <= REGISTER_DECODE_ROWS
        if few:
            rows = -(-shape.rows // isa.row_group) * isa.row_group
            widest = min(4, -(-shape.columns // isa.lanes), (isa.registers - 4) // (rows + 2 * isa.row_group))
            tile = rows, max(1, widest)
        else:
            tile = isa.tile(shape.rows, shape.columns)
        # Where a step is two instructions a product, the loop's own instructions weigh more.
        unroll = 1 + isa.temporaries
        panels = -(-shape.columns // (tile[1] * isa.lanes))
        decodes = _decodes(isa, shape.weight)
        by_rows = not few and favours_rows(shape.rows, tile[0], panels, threads, decodes)
        return cls(*tile, SCRATCH_BYTES, few, False, unroll, by_rows)

    @classmethod
    def space(cls, isa: InstructionSet, shape: GemmShape, threads: int) -> Space:
        default = cls.default(isa, shape, threads)
        few, one_tile = shape.rows <= 16 and isa.split is None, shape.rows <= default.tile_rows
        return _with_default(
            default.decisions(),
            {
                "tile": _tiles(isa, shape.rows, shape.columns),
                "scratch_bytes": set() if one_tile else {size * 1024 for size in (32, 96, 192, 384, 768)},
                "register_decode": {0, 1} if few else set(),
                "rows_outer": {0, 1} if few and not one_tile else set(),
                "unroll": {1, 2, 4},
                "parallel_rows": {0, 1} if threads > 1 else set(),
            },
        )

    def for_vectors(self, vectors: int, isa: InstructionSet, rows: int) -> GemmSchedule:
        """The schedule for weights that are packed for other tiles; no more rows to a tile than fit then."""
        most = next(most for most in range(self.tile_rows, 0, -isa.row_group) if isa.fits(most, vectors))
        return replace(self, tile_rows=most, vectors=vectors).for_rows(rows, isa.row_group)

    def for_rows(self, rows: int, row_group: int) -> GemmSchedule:
        """The schedule for another number of rows: weights packed alike, and tiles that leave no short one."""
        tiles = -(-rows // self.tile_rows)
        return replace(self, tile_rows=-(-rows // (tiles * row_group)) * row_group)

    def decisions(self) -> Decisions:
        return {
            "tile": self.tile_rows * _TILE + self.vectors,
            "scratch_bytes": self.scratch_bytes,
            "register_decode": int(self.register_decode),
            "rows_outer": int(self.rows_outer),
            "unroll": self.unroll,
            "parallel_rows": int(self.parallel_rows),
        }

    @classmethod
    def from_decisions(cls, decisions: Decisions) -> GemmSchedule:
        register_decode = bool(decisions["register_decode"])
        return cls(
            *divmod(decisions["tile"], _TILE),
            decisions["scratch_bytes"],
            register_decode,
            register_decode and bool(decisions["rows_outer"]),
            decisions["unroll"],
            bool(decisions["parallel_rows"]),
        )


@dataclass(frozen=True)
class ConvSchedule:
    """Convolutions through a slab of decoded rows."""

    tile_rows: int
    """Neighbouring pixels of a tile."""
    vectors: int
    scratch_bytes: int
    """Slab of one block of output rows, at most about so many."""
    unroll: int
    """Channel steps written out in the loop."""
    parallel_rows: bool
    """Threads share blocks of output rows, else panels."""

    @classmethod
    def default(cls, isa: InstructionSet, shape: ConvShape, threads: int) -> ConvSchedule:
        tile = isa.tile(shape.out_width, shape.out_channels // shape.groups, row_length=shape.out_width)
        is_image = shape.channels <= MOST_IMAGE_CHANNELS and shape.out_width >= IMAGE_TILE[0]
        if isa.name == "avx512" and is_image:
            tile = IMAGE_TILE
        panels = -(-shape.out_channels // shape.groups // (tile[1] * isa.lanes))
        width = shape.out_width
        by_rows = favours_rows(shape.out_height * width, width, panels, threads, _decodes(isa, shape.weight))
        return cls(*tile, SCRATCH_BYTES, 1, by_rows)

    @classmethod
    def space(cls, isa: InstructionSet, shape: ConvShape, threads: int) -> Space:
        return _with_default(
            cls.default(isa, shape, threads).decisions(),
            {
                "tile": _tiles(isa, shape.out_width, shape.out_channels // shape.groups),
                "scratch_bytes": {size * 1024 for size in (32, 96, 192, 384, 768)},
                "unroll": {1, 2, 4},
                "parallel_rows": {0, 1} if threads > 1 else set(),
            },
        )

    def decisions(self) -> Decisions:
        return {
            "tile": self.tile_rows * _TILE + self.vectors,
            "scratch_bytes": self.scratch_bytes,
            "unroll": self.unroll,
            "parallel_rows": int(self.parallel_rows),
        }

    @classmethod
    def from_decisions(cls, decisions: Decisions) -> ConvSchedule:
        return cls(
            *divmod(decisions["tile"], _TILE),
            decisions["scratch_bytes"],
            decisions["unroll"],
            bool(decisions["parallel_rows"]),
        )


@dataclass(frozen=True)
class DepthwiseSchedule:
    """Depthwise convolutions, a block of channels at a time."""

    tile_pixels: int
    vectors: int
    """int32 vectors of a block of channels, 1 or 2; the codes of two fill one int16 vector when they are decoded."""
    slab_bytes: int
    """Decoded rows of one vector of channels, at most about so many."""
    channels_outer: bool
    """Vectors of channels outside, blocks of output rows inside; threads share the outer loop."""

    @classmethod
    def default(cls, isa: InstructionSet, shape: ConvShape, threads: int) -> DepthwiseSchedule:
        pair = 2 * isa.lanes
        little_waste = (
            -(-shape.channels // pair) * pair * 16 <= -(-shape.channels // isa.lanes) * isa.lanes * 17
        )
        vectors = 2 if shape.channels >= pair and little_waste else 1
        # Short rows as a whole; tiles of longer ones need not be large to hide a multiply-add's latency.
        most = 6 // vectors if isa.registers < 32 else 8 if shape.out_width <= 8 else 4
        tile_pixels = min(shape.out_width, most)
        return cls(tile_pixels, vectors, SLAB_BYTES, False)

    @classmethod
    def space(cls, isa: InstructionSet, shape: ConvShape, threads: int) -> Space:
        widest = min(shape.out_width, isa.registers - 2)
        return _with_default(
            cls.default(isa, shape, threads).decisions(),
            {
                "tile_pixels": set(range(min(3, widest), widest + 1)),
                "vectors": {1, 2} if shape.channels >= 2 * isa.lanes else {1},
                "slab_bytes": {size * 1024 for size in (8, 16, 32, 64, 128, 384)},
                "channels_outer": {0, 1},
            },
        )

    def decisions(self) -> Decisions:
        return {
            "tile_pixels": self.tile_pixels,
            "vectors": self.vectors,
            "slab_bytes": self.slab_bytes,
            "channels_outer": int(self.channels_outer),
        }

    @classmethod
    def from_decisions(cls, decisions: Decisions) -> DepthwiseSchedule:
        channels_outer = bool(decisions["channels_outer"])
        return cls(decisions["tile_pixels"], decisions["vectors"], decisions["slab_bytes"], channels_outer)


@dataclass(frozen=True)
class BatchMatmulSchedule:
    """Products of two activations."""

    tile_rows: int
    vectors: int
    unroll: int

    @classmethod
    def default(cls, isa: InstructionSet, shape: BatchMatmulShape, threads: int) -> BatchMatmulSchedule:
        return cls(*isa.tile(shape.rows, shape.columns), 1)

    @classmethod
    def space(cls, isa: InstructionSet, shape: BatchMatmulShape, threads: int) -> Space:
        return _with_default(
            cls.default(isa, shape, threads).decisions(),
            {"tile": _tiles(isa, shape.rows, shape.columns), "unroll": {1, 2, 4}},
        )

    def decisions(self) -> Decisions:
        return {"tile": self.tile_rows * _TILE + self.vectors, "unroll": self.unroll}

    @classmethod
    def from_decisions(cls, decisions: Decisions) -> BatchMatmulSchedule:
        return cls(*divmod(decisions["tile"], _TILE), decisions["unroll"])


KernelSchedule = GemmSchedule | ConvSchedule | DepthwiseSchedule | BatchMatmulSchedule
Family = type[GemmSchedule] | type[ConvSchedule] | type[DepthwiseSchedule] | type[BatchMatmulSchedule]
ScheduleChooser = Callable[[Any, InstructionSet, Any, int], Any]
"""(family, instruction set, shape, threads) -> a schedule of that family."""


def default_schedule(family: Any, isa: InstructionSet, shape: Any, threads: int) -> Any:
    """The ``ScheduleChooser`` that knows no tuning log."""
    return family.default(isa, shape, threads)
