"""How a dense layer or convolution is laid out for tensor cores: the reduction in chunks of eight codes, and tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from tvm_qfp8.format import decode_grid, get_layout
from tvm_qfp8.topi.conv2d import ConvShape
from tvm_qfp8.topi.cuda.launch import MANY_BLOCKS
from tvm_qfp8.topi.exact_sums import exact_steps
from tvm_qfp8.topi.panels import round_up

CHUNK = 8
"""Codes that a thread loads at once: neighbouring channels of one tap."""
STEP = 32
"""Codes of a row that are decoded to float16 together, two steps of a tensor core."""
WARP_COLUMNS = 32


@dataclass(frozen=True)
class Tile:
    """Rows and columns of the output that a thread block makes."""

    warps_down: int
    warps_across: int
    fragments: int
    """16 rows each, of one warp."""

    @property
    def rows(self) -> int:
        return self.warps_down * self.fragments * 16

    @property
    def columns(self) -> int:
        return self.warps_across * WARP_COLUMNS

    @property
    def threads(self) -> int:
        return 32 * self.warps_down * self.warps_across


TILES = (Tile(2, 4, 4), Tile(2, 2, 2), Tile(1, 2, 2))
"""128 x 128, 64 x 64 and 32 x 64."""


@dataclass(frozen=True)
class GroupTile:
    """Rows and columns that a thread block makes where four warps, a group, multiply together."""

    groups: int
    columns: int

    @property
    def rows(self) -> int:
        return self.groups * 64

    @property
    def threads(self) -> int:
        return self.groups * 128


GROUP_TILES = (GroupTile(2, 128), GroupTile(2, 64), GroupTile(1, 64))
GROUP_RUN = 64
"""Codes of a row that groups decode together."""
GROUP_LOAD = 2 * CHUNK
"""Codes that a thread loads at once there, so that channels are a multiple of them."""
INTEGER_RUN = 128
"""Codes of a row that groups multiply together as int8."""
GROUP_BLOCKS = 96
"""Of the largest tile for which there are so many, a large GPU is busy."""

_AnyTile = TypeVar("_AnyTile", Tile, GroupTile)


@dataclass(frozen=True)
class ConvPlan:
    """A convolution in one group, channels last, as a product ``(pixels, depth) x (depth, out_channels)``."""

    shape: ConvShape
    exact: int
    """Codes of a row after which accumulators go to int32; not used where they are."""

    @property
    def rows(self) -> int:
        return self.shape.batch * self.shape.out_height * self.shape.out_width

    @property
    def channel_chunks(self) -> int:
        return -(-self.shape.channels // CHUNK)

    @property
    def depth(self) -> int:
        """Codes of a stored row."""
        return round_up(self._row, self.step)

    @property
    def step(self) -> int:
        """Codes of a row that are decoded together."""
        return STEP

    @property
    def _row(self) -> int:
        kernel_h, kernel_w = self.shape.kernel
        return kernel_h * kernel_w * self.channel_chunks * CHUNK

    @property
    def tile(self) -> Tile:
        """What a thread block makes."""
        return self._largest(TILES, MANY_BLOCKS)

    def _largest(self, tiles: Sequence[_AnyTile], enough: int) -> _AnyTile:
        """The largest tile of which there are enough to keep a GPU busy, else the smallest."""
        for tile in tiles:
            if -(-self.rows // tile.rows) * -(-self.shape.out_channels // tile.columns) >= enough:
                return tile
        return tiles[-1]


class IntegerPlan(ConvPlan):
    """The same where grid values are int8, or uint8 those of activations: sums are int32 throughout."""

    @property
    def step(self) -> int:
        """Codes of a row that are decoded together: as many bytes as float16's."""
        return 2 * STEP


class GroupPlan(ConvPlan):
    """The same on Hopper's tensor cores, ``warpgroup_gemm.py``."""

    @property
    def depth(self) -> int:
        """Codes of a stored row: a turn of the loop takes two runs."""
        return round_up(self._row, 2 * GROUP_RUN)

    @property
    def group_tile(self) -> GroupTile:
        """What a thread block makes."""
        return self._largest(GROUP_TILES, GROUP_BLOCKS)


class IntegerGroupPlan(GroupPlan):
    """The same for grid values as in ``IntegerPlan``, ``integer_gemm.py``."""

    @property
    def depth(self) -> int:
        """Codes of a stored row."""
        return round_up(self._row, INTEGER_RUN)


def pack_weights(codes: np.ndarray, depth: int) -> np.ndarray:
    """Codes OHWI ``(out_channels, kh, kw, channels)`` -> ``(out_channels, depth)``, channels of a tap in whole chunks.

    What is padded is code 0: the activations there may be anything.
    """
    channels = codes.shape[3]
    padded = np.pad(codes, ((0, 0), (0, 0), (0, 0), (0, round_up(channels, CHUNK) - channels)))
    rows = padded.reshape(len(codes), -1)
    return np.pad(rows, ((0, 0), (0, depth - rows.shape[1])))


def as_integers(codes: np.ndarray) -> np.ndarray:
    """Codes E1M6 as bytes int8, held as uint8."""
    return decode_grid(codes, get_layout("E1M6")).astype(np.int8).view(np.uint8)


def plan_conv(shape: ConvShape, codes: np.ndarray, hopper: bool = False) -> ConvPlan | None:
    """The plan for weights OHWI; None where tensor cores do not fit: groups, few channels, sums that are not exact.

    ``hopper`` asks for a ``GroupPlan``, which is given where channels allow it. Where grid values are int8 it is the
    plan for integers.
    """
    if shape.groups != 1 or shape.channels_first or shape.input_dilation != (1, 1) or shape.channels < CHUNK:
        return None
    activation, weight = shape.layouts()
    by_groups = hopper and shape.channels % GROUP_LOAD == 0
    if activation.exponent_bits == 1 and weight.exponent_bits == 1 and weight.signed:
        return (IntegerGroupPlan if by_groups else IntegerPlan)(shape, 0)
    plan, step = (GroupPlan, GROUP_RUN) if by_groups else (ConvPlan, STEP)
    steps = exact_steps(pack_weights(codes, plan(shape, 0).depth), weight, activation, step)
    if steps:
        return plan(shape, steps * step)
    return plan_conv(shape, codes) if by_groups else None
