"""Input rows of a convolution in scratch: padded with zeros, dilated, channels of a group beside each other.

Code 0 stands for zero in every layout, and its operand is zero, so padding is a zero in the slab.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import zero_run
from tvm_qfp8.topi.prim_func import load, store, vector_runs
from tvm_qfp8.topi.sharing import shared_blocks

if TYPE_CHECKING:
    from tvm_qfp8.topi.conv2d import ConvShape


@dataclass(frozen=True)
class SlabRows:
    """Which input rows lie in the slab of a block of output rows."""

    block: int
    """Output rows of a block."""
    blocks: int
    """The last one may overlap the one before it."""
    rows: int
    """Of the slab."""
    step: int
    """Input rows from one row of the slab to the next: 1, or with one output row to a block the filter's dilation."""


def slab_rows(shape: ConvShape, most_rows: int, most_block: int, threads: int) -> SlabRows:
    """Blocks of at most ``most_block`` output rows whose slab has about ``most_rows``, as many for each thread.

    A dilated filter reaches over many rows of which each output row meets few: where such slabs were more in all, each
    output row has one of its own.
    """
    kernel_h, dilation = shape.kernel[0], shape.dilation[0]
    reach = dilation * (kernel_h - 1) + 1
    fitting = (most_rows - reach) // shape.stride[0] + 1
    block, blocks = shared_blocks(shape.out_height, min(most_block, fitting), threads)
    rows = (block - 1) * shape.stride[0] + reach
    if dilation > 1 and blocks * rows > shape.out_height * kernel_h:
        return SlabRows(1, shape.out_height, kernel_h, dilation)
    return SlabRows(block, blocks, rows, 1)


def slab_filler(
    isa: InstructionSet,
    shape: ConvShape,
    x,
    rows: SlabRows,
    slab_channels: int,
    dtype: str,
    bring: Callable,
) -> Callable:
    """``fill(image, first output row, group, slab, start)``, which fills the ``rows`` of a slab of ``dtype``.

    ``slab_channels`` are the channels of a group with padding; ``bring(source index, target, target index, length)``
    makes elements of the slab from codes of ``x``.
    """
    channels = shape.channels // shape.groups
    slab_row = shape.slab_width * slab_channels

    def interleave_planes(image, source_row, slab, start) -> None:
        """One row of an NCHW image: the planes' pixels next to each other, zeros as the channels missing."""
        planes = T.alloc_buffer((slab_channels * shape.width,), dtype, align=64)
        for channel in range(channels):
            source = ((image * channels + channel) * shape.height + source_row) * shape.width
            bring(source, planes, channel * shape.width, shape.width)
        zero_run(isa, planes, channels * shape.width, (slab_channels - channels) * shape.width)

        def emit(offset, lanes) -> None:
            parts = [load(planes, channel * shape.width + offset, lanes) for channel in range(slab_channels)]
            order = [channel * lanes + lane for lane in range(lanes) for channel in range(slab_channels)]
            pixels = tirx.Shuffle(parts, [tirx.const(place, "int32") for place in order])
            store(slab, start + offset * slab_channels, pixels, lanes * slab_channels)

        vector_runs(shape.width, isa.lanes, emit)

    def fill_row(image, source_row, group, slab, slab_at) -> None:
        source = ((image * shape.height + source_row) * shape.width) * shape.channels + group * channels
        left = shape.padding[1] * slab_channels
        zero_run(isa, slab, slab_at, left)
        if shape.channels_first:
            interleave_planes(image, source_row, slab, slab_at + left)
        elif shape.input_dilation[1] == 1 and shape.groups == 1 and slab_channels == channels:
            bring(source, slab, slab_at + left, shape.width * channels)
        elif shape.input_dilation[1] == 1 and shape.groups == 1:
            # Decode the row in one run, then spread the pixels to their padded length.
            row = T.alloc_buffer((shape.width * channels,), dtype, align=64)
            bring(source, row, 0, shape.width * channels)
            with T.serial(0, shape.width) as pixel:
                at = slab_at + left + pixel * slab_channels
                for c in range(channels):
                    store(slab, at + c, load(row, pixel * channels + c, 1), 1)
                zero_run(isa, slab, at + channels, slab_channels - channels)
        else:
            pixel_step = shape.input_dilation[1] * slab_channels
            if shape.input_dilation[1] > 1:
                zero_run(isa, slab, slab_at, slab_row)
            with T.serial(0, shape.width) as pixel:
                at = slab_at + left + pixel * pixel_step
                bring(source + pixel * shape.channels, slab, at, channels)
                zero_run(isa, slab, at + channels, slab_channels - channels)
        right = shape.padding[3] * slab_channels
        zero_run(isa, slab, slab_at + slab_row - right, right)

    def fill_slab(image, first_out_row, group, slab, start=0) -> None:
        with T.serial(0, rows.rows) as r:
            slab_at = T.bind(first_out_row * shape.stride[0] + r * rows.step - shape.padding[0])
            step = shape.input_dilation[0]
            source_row = tirx.floordiv(slab_at, step) if step > 1 else slab_at
            inside = tirx.And(slab_at >= 0, source_row < shape.height)
            if step > 1:
                inside = tirx.And(inside, tirx.floormod(slab_at, step) == 0)
            with T.If(inside):
                with T.Then():
                    fill_row(image, source_row, group, slab, start + r * slab_row)
                with T.Else():
                    zero_run(isa, slab, start + r * slab_row, slab_row)

    return fill_slab
