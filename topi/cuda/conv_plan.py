"""How a dense layer or convolution is laid out for tensor cores: the reduction in chunks of eight codes, and tiles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tvm_qfp8.topi.conv2d import ConvShape
from tvm_qfp8.topi.cuda.exact_blocks import exact_steps
from tvm_qfp8.topi.panels import round_up

CHUNK = 8
"""Codes that a thread loads at once: neighbouring channels of one tap."""
STEP = 32
"""Codes of a row that are decoded together, two steps of a tensor core."""
WARP_COLUMNS = 32
MANY_BLOCKS = 128
"""About as many as a large GPU has multiprocessors."""


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
class ConvPlan:
    """A convolution in one group, channels last, as a product ``(pixels, depth) x (depth, out_channels)``."""

    shape: ConvShape
    exact_steps: int
    """Steps of ``STEP`` after which accumulators go to int32."""

    @property
    def rows(self) -> int:
        return self.shape.batch * self.shape.out_height * self.shape.out_width

    @property
    def channel_chunks(self) -> int:
        return -(-self.shape.channels // CHUNK)

    @property
    def depth(self) -> int:
        kernel_h, kernel_w = self.shape.kernel
        return round_up(kernel_h * kernel_w * self.channel_chunks * CHUNK, STEP)

    @property
    def tile(self) -> Tile:
        """The largest tile of which there are enough to keep a GPU busy, else the smallest."""
        for tile in TILES:
            if -(-self.rows // tile.rows) * -(-self.shape.out_channels // tile.columns) >= MANY_BLOCKS:
                return tile
        return TILES[-1]


def pack_weights(codes: np.ndarray, depth: int) -> np.ndarray:
    """Codes OHWI ``(out_channels, kh, kw, channels)`` -> ``(out_channels, depth)``, channels of a tap in whole chunks.

    What is padded is code 0: the activations there may be anything.
    """
    channels = codes.shape[3]
    padded = np.pad(codes, ((0, 0), (0, 0), (0, 0), (0, round_up(channels, CHUNK) - channels)))
    rows = padded.reshape(len(codes), -1)
    return np.pad(rows, ((0, 0), (0, depth - rows.shape[1])))


def plan_conv(shape: ConvShape, codes: np.ndarray) -> ConvPlan | None:
    """The plan for weights OHWI; None where tensor cores do not fit: groups, few channels, sums that are not exact."""
    if shape.groups != 1 or shape.channels_first or shape.input_dilation != (1, 1) or shape.channels < CHUNK:
        return None
    activation, weight = shape.layouts()
    draft = ConvPlan(shape, 1)
    steps = exact_steps(pack_weights(codes, draft.depth), weight, activation, STEP)
    return ConvPlan(shape, steps) if steps else None
