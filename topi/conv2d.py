"""Convolution, NHWC codes in, as an implicit matrix product over decoded rows.

The input rows that a block of output rows needs are decoded once into a zero-padded slab; a register tile
covers neighbouring pixels of one output row, and walks the taps and channels. Groups are walked one after the
other, narrow ones merged. Code 0 stands for zero in every layout, so padding is a zero in the slab.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.format import Layout
from tvm_qfp8.topi.gemm import MIN_PARALLEL_MACS
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.micro_kernel import RegisterTile
from tvm_qfp8.topi.panels import (
    PanelShape,
    PanelWeights,
    copy_run,
    decode_operand,
    decode_run,
    for_each_panel,
    overlapped_start,
    pack_weights,
    panel_size,
    round_up,
)
from tvm_qfp8.topi.schedules import ConvSchedule
from tvm_qfp8.topi.sharing import rows_of_block
from tvm_qfp8.topi.slab import slab_filler, slab_rows


@dataclass(frozen=True)
class ConvShape:
    """A convolution of ``(batch, height, width, channels)`` codes; all numbers static."""

    batch: int
    height: int
    width: int
    channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    """Top, left, bottom, right."""
    dilation: tuple[int, int]
    groups: int
    activation: Layout | None
    """None where the activation is float32."""
    weight: Layout | None
    input_dilation: tuple[int, int] = (1, 1)
    """Pixels are this far apart, zeros between them: a transposed convolution with these strides."""
    channels_first: bool = False
    """The input is ``(batch, channels, height, width)``; for few channels in one group."""

    def layouts(self) -> tuple[Layout, Layout]:
        """Layouts of activation and weight, where both are quantized."""
        assert self.activation is not None and self.weight is not None
        return self.activation, self.weight

    @property
    def slab_height(self) -> int:
        """Input rows with padding and zeros between rows."""
        return (self.height - 1) * self.input_dilation[0] + 1 + self.padding[0] + self.padding[2]

    @property
    def slab_width(self) -> int:
        """Pixels of a padded input row, with zeros between them."""
        return (self.width - 1) * self.input_dilation[1] + 1 + self.padding[1] + self.padding[3]

    @property
    def out_height(self) -> int:
        return (self.slab_height - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        return (self.slab_width - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.stride[1] + 1

    @property
    def is_column(self) -> bool:
        """Whether images are a pixel wide, as one-dimensional signals are in some files."""
        beside = self.kernel[1], *self.padding[1::2]
        return self.height > self.width == 1 and beside == (1, 0, 0)

    def column_as_row(self) -> ConvShape:
        """The same convolution of the same memory, of images a pixel high: kernels walk along rows."""
        return replace(
            self,
            height=1,
            width=self.height,
            kernel=(1, self.kernel[0]),
            stride=(1, self.stride[0]),
            padding=(0, self.padding[0], 0, self.padding[2]),
            dilation=(1, self.dilation[0]),
            input_dilation=(1, self.input_dilation[0]),
        )

    @property
    def is_pointwise(self) -> bool:
        """A 1x1 convolution that is just a dense layer over pixels."""
        ones = self.kernel == self.stride == self.input_dilation == (1, 1) and not self.channels_first
        return ones and self.padding == (0, 0, 0, 0) and self.groups == 1

    @property
    def spreads_pixels(self) -> bool:
        """A transposed convolution that makes of each pixel a window of its own: a dense layer, too."""
        window, (high, wide) = self.input_dilation, self.kernel
        plain = self.stride == self.dilation == (1, 1) and self.groups == 1 and not self.channels_first
        around = (high - 1, wide - 1, high - 1, wide - 1)
        return plain and self.kernel == window != (1, 1) and self.padding == around


def merged_groups(
    shape: ConvShape, codes: np.ndarray, depth: int, width: int, most_inputs: int | None = None
) -> tuple[ConvShape, np.ndarray]:
    """The same convolution with as many of its groups merged into one as takes the fewest products.

    Parameters
    ----------
    shape : ConvShape
    codes : array ``(out_channels, kh, kw, channels / groups)``
        Those between merged groups are 0: zeros.
    depth, width : int
        Channels that go into a product, and come out of it.
    most_inputs : int
        Channels that a merged group reads.
    """
    inputs, outputs = shape.channels // shape.groups, shape.out_channels // shape.groups

    def products(merged: int) -> int:
        return shape.groups // merged * -(-merged * inputs // depth) * -(-merged * outputs // width)

    counts = [m for m in range(1, shape.groups + 1) if shape.groups % m == 0]
    fitting = [m for m in counts if m == 1 or most_inputs is None or m * inputs <= most_inputs]
    merged = min(fitting, key=lambda m: (products(m), -m))
    wide = np.zeros((*codes.shape[:3], merged * inputs), codes.dtype)
    for channel in range(shape.out_channels):
        first = channel // outputs % merged * inputs
        wide[channel, :, :, first : first + inputs] = codes[channel]
    return replace(shape, groups=shape.groups // merged), wide


def pack_conv_weights(
    isa: InstructionSet, shape: ConvShape, codes: np.ndarray, schedule: ConvSchedule
) -> np.ndarray:
    """Codes OHWI ``(out_channels, kh, kw, channels / groups)`` -> panels, one set per group."""
    padding = round_up(codes.shape[3], isa.pair) - codes.shape[3]
    padded = np.pad(codes, ((0, 0), (0, 0), (0, 0), (0, padding)))
    per_group = padded.reshape(shape.groups, codes.shape[0] // shape.groups, -1)
    return np.stack([pack_weights(isa, shape.weight, group, schedule.vectors) for group in per_group])


def emit_conv2d(
    isa: InstructionSet,
    shape: ConvShape,
    x,
    panels,
    epilogue: Callable,
    threads: int,
    schedule: ConvSchedule,
    of_block: Callable | None = None,
) -> None:
    """Emit the loops; ``epilogue(acc, row, column, valid)`` with ``row`` the flattened output pixel.

    ``of_block(first pixel, output rows)``, called before a block of output rows is computed, gives the epilogue of the
    block instead, and what is emitted after it.
    """
    tile_rows, vectors = schedule.tile_rows, schedule.vectors
    activation = shape.activation
    kernel_h, kernel_w = shape.kernel
    stride_h, stride_w = shape.stride
    dilation_h, dilation_w = shape.dilation
    channels = shape.channels // shape.groups
    out_channels = shape.out_channels // shape.groups
    slab_channels = round_up(channels, isa.pair)
    slab_row = shape.slab_width * slab_channels
    depth = kernel_h * kernel_w * slab_channels
    out_h, out_w = shape.out_height, shape.out_width
    panel_shape = PanelShape(out_channels, depth, vectors, shape.weight)
    group_size = -(-out_channels // (vectors * isa.lanes)) * panel_size(isa, depth, vectors)

    macs = shape.batch * out_h * out_w * shape.out_channels * depth
    parallel = threads > 1 and macs >= MIN_PARALLEL_MACS
    row_bytes = slab_row * (2 if isa.split else isa.operand_bytes)
    by_rows = parallel and schedule.parallel_rows
    most_block = rows_of_block(out_h, threads) if by_rows else out_h
    in_slab = slab_rows(shape, schedule.scratch_bytes // row_bytes, most_block, threads if by_rows else 1)
    slab_size = in_slab.rows * slab_row
    tap_row = dilation_h // in_slab.step * slab_row

    # Byte products take several parts of each value: those are made of the padded codes, in one run.
    slab_dtype = "uint8" if isa.split else isa.operand_dtype

    def bring(source_at, target, target_at, length: int) -> None:
        if isa.split:
            copy_run(isa, x, source_at, target, target_at, length)
        else:
            decode_run(isa, activation, x, source_at, target, target_at, length)

    fill_slab = slab_filler(isa, shape, x, in_slab, slab_channels, slab_dtype, bring)

    def tile(slab, row_in_block, first_pixel, out_row_at, group, weights: PanelWeights, finish) -> None:
        registers = RegisterTile(isa, tile_rows, vectors)
        corner = T.bind((row_in_block * stride_h) * slab_row + first_pixel * (stride_w * slab_channels))

        def tap(kh, kw, product: int) -> None:
            offset = T.bind(product * slab_size + corner + kh * tap_row + kw * (dilation_w * slab_channels))
            starts = [offset + i * (stride_w * slab_channels) for i in range(tile_rows)]
            steps = slab_channels // isa.pair
            first = (kh * kernel_w + kw) * steps

            def load_weights(step, vector):
                return weights.load(first + step, vector, product)

            registers.reduce(slab, starts, steps, schedule.unroll, load_weights, product)

        for product in range(isa.products):
            with T.serial(0, kernel_h) as kh:
                with T.serial(0, kernel_w) as kw:
                    tap(kh, kw, product)
        for i in range(tile_rows):
            for j, valid in enumerate(weights.valid):
                column = group * out_channels + weights.column(j)
                total = weights.without_offset(registers.value(i, j), j)
                finish(total, out_row_at + first_pixel + i, column, valid)

    def tiles_of_block(slab, image, first_out_row, group, weights: PanelWeights, finish) -> None:
        with T.serial(0, in_slab.block) as row:
            out_row_at = T.bind((image * out_h + first_out_row + row) * out_w)
            with T.serial(0, -(-out_w // tile_rows)) as t:
                tile(slab, row, overlapped_start(t, tile_rows, out_w), out_row_at, group, weights, finish)

    def block(image, index, group) -> None:
        first_out_row = overlapped_start(index, in_slab.block, out_h)
        finish, after = epilogue, None
        if of_block is not None:
            finish, after = of_block(T.bind((image * out_h + first_out_row) * out_w), in_slab.block)
        slab = T.alloc_buffer((slab_size,), slab_dtype, align=64)
        fill_slab(image, first_out_row, group, slab)
        if isa.split is not None and not isa.takes(activation):
            codes = slab
            slab = T.alloc_buffer((isa.activation_parts * slab_size,), "int8", align=64)
            parts = isa.split.activation_parts
            decode_operand(isa, activation, parts, codes, 0, slab, 0, slab_size, slab_size)
        group_panels = (
            T.decl_buffer(
                (group_size,),
                str(panels.dtype),
                data=panels.data,
                elem_offset=panels.elem_offset + group * group_size,
            )
            if shape.groups > 1
            else panels
        )
        for_each_panel(
            isa,
            panel_shape,
            group_panels,
            lambda weights: tiles_of_block(slab, image, first_out_row, group, weights, finish),
            loop=T.parallel if parallel and not by_rows else T.serial,
        )
        if after is not None:
            after()

    with T.serial(0, shape.batch) as image:
        with T.serial(0, shape.groups) as group:
            if in_slab.blocks == 1:
                block(image, 0, group)
            else:
                with (T.parallel if by_rows else T.serial)(0, in_slab.blocks) as index:
                    block(image, index, group)
