"""Dense layers and convolutions on tensor cores: codes ``(pixels, channels)`` times codes ``(out_channels, depth)``.

A block of threads makes a tile of the output. Codes of the next step are loaded while the current one is multiplied;
they are decoded to float16 on their way to shared memory, so each is decoded once a block. A convolution reads its
pixels where they lie (implicit matrix product): padding is a mask. Rows and columns beyond the last repeat it, and
write the same bits again, so that no thread stands aside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.cuda.conv_plan import CHUNK, STEP, WARP_COLUMNS, ConvPlan, IntegerPlan, Tile
from tvm_qfp8.topi.cuda.device import (
    MMA_ROWS,
    decode_pairs,
    grid_exponent,
    integers_of,
    mma,
    mma_integers,
)
from tvm_qfp8.topi.prim_func import load, store

WORDS = STEP // 2
"""uint32 words of a decoded row of a step."""
FRAGMENT = 8
"""Columns of one step of a tensor core."""


class Accumulators:
    """float32 accumulators of tensor cores, emptied into int32 before a sum could round."""

    def __init__(self, size: int, exponent: int, one_block: bool) -> None:
        self.size, self.scale = size, tirx.const(float(2**exponent), "float32")
        self.floats = T.alloc_buffer((size,), "float32", scope="local")
        self.integers = None if one_block else T.alloc_buffer((size,), "int32", scope="local")
        for index in range(size):
            store(self.floats, index, tirx.const(0.0, "float32"), 1)
            if self.integers is not None:
                store(self.integers, index, tirx.const(0, "int32"), 1)

    @property
    def dtype(self) -> str:
        """Of what ``value`` gives."""
        return "float32" if self.integers is None else "int32"

    def add(self, index: int, left: list, right: list) -> None:
        """Add a product to four sums."""
        T.evaluate(mma(self.floats, index, left, right))

    def value(self, index: int):
        """A sum."""
        return (
            load(self.floats, index, 1) * self.scale
            if self.integers is None
            else load(self.integers, index, 1)
        )

    def empty(self) -> None:
        """Move the sums to int32."""
        assert self.integers is not None
        for index in range(self.size):
            exact = (load(self.floats, index, 1) * self.scale).astype("int32")
            store(self.integers, index, load(self.integers, index, 1) + exact, 1)
            store(self.floats, index, tirx.const(0.0, "float32"), 1)


class IntegerSums:
    """int32 accumulators."""

    dtype = "int32"

    def __init__(self, size: int, signed: bool = True) -> None:
        self.integers = T.alloc_buffer((size,), "int32", scope="local")
        self._signed = signed
        for index in range(size):
            store(self.integers, index, tirx.const(0, "int32"), 1)

    def add(self, index: int, left: list, right: list) -> None:
        """Add a product to four sums."""
        T.evaluate(mma_integers(self.integers, index, left, right, self._signed))

    def value(self, index: int):
        """A sum."""
        return load(self.integers, index, 1)


def words_of(buffer, size: int):
    """A buffer of codes as uint32 words."""
    return T.decl_buffer((size // 4,), "uint32", data=buffer.data)


def load_chunk(x, size: int, address, aligned: int, target, at: int) -> None:
    """Eight codes from ``address`` into two words of ``target``; beyond the end of ``x`` anything may be read.

    ``aligned`` codes lie within one word or pair of words for every chunk: 8, 4, or 1.
    """
    if aligned == CHUNK:
        start = tirx.min(address, tirx.const(size - CHUNK, "int32")) // 4
        store(target, at, load(words_of(x, size), start, 2), 2)
        return
    for word in range(2):
        if aligned == 4:
            start = tirx.min(address + 4 * word, tirx.const(size - 4, "int32")) // 4
            store(target, at + word, load(words_of(x, size), start, 1), 1)
            continue
        value = None
        for byte in range(4):
            place = tirx.min(address + 4 * word + byte, tirx.const(size - 1, "int32"))
            code = load(x, place, 1).astype("uint32") << tirx.const(8 * byte, "uint32")
            value = code if value is None else value | code
        store(target, at + word, value, 1)


def emit_conv(plan: ConvPlan, x, weights, epilogue: Callable) -> None:
    """Emit the kernel; ``epilogue(sum, row, column, valid)`` finishes one value of output pixel ``row``."""
    shape, tile = plan.shape, plan.tile
    activation, weight = shape.layouts()
    rows, columns, steps = plan.rows, shape.out_channels, plan.depth // plan.step
    exponent = grid_exponent(activation) + grid_exponent(weight)
    integers = isinstance(plan, IntegerPlan)

    def words_of_filters(codes):
        return (codes,) if integers else decode_pairs(codes, weight)

    def words_of_pixels(codes):
        if not integers:
            return decode_pairs(codes, activation)
        return (integers_of(codes) if activation.signed else codes,)

    with T.launch_thread("blockIdx.x", -(-rows // tile.rows)) as block_row:
        with T.launch_thread("blockIdx.y", -(-columns // tile.columns)) as block_column:
            with T.launch_thread("threadIdx.x", tile.threads) as thread:
                first_row, first_column = block_row * tile.rows, block_column * tile.columns
                read = _pixel_reader(plan, x, first_row)
                left = _Operand(words_of_pixels, plan.step, tile.rows, tile.threads, thread, read)
                read = _filter_reader(plan, weights, first_column)
                right = _Operand(words_of_filters, plan.step, tile.columns, tile.threads, thread, read)
                warp = _Warp(tile, thread)
                size = tile.fragments * 16
                sums: Any = (
                    IntegerSums(size, activation.signed)
                    if integers
                    else Accumulators(size, exponent, plan.exact >= plan.depth)
                )
                left.fetch(0)
                right.fetch(0)
                left.decode(0)
                right.decode(0)
                with T.serial(0, steps) as step:
                    with T.If(step + 1 < steps):
                        with T.Then():
                            left.fetch(step + 1)
                            right.fetch(step + 1)
                    warp.multiply(left, right, step % 2, sums)
                    if not integers and sums.integers is not None:
                        exact = plan.exact // STEP
                        whole = tirx.floormod(step, exact) == exact - 1
                        with T.If(tirx.Or(whole, step == steps - 1)):
                            with T.Then():
                                sums.empty()
                    with T.If(step + 1 < steps):
                        with T.Then():
                            left.decode((step + 1) % 2)
                            right.decode((step + 1) % 2)
                warp.finish(sums, first_row, first_column, rows, columns, epilogue)


def pixel_locator(plan: ConvPlan, first_row) -> Callable:
    """``locator(row) -> locate(chunk) -> (address, inside)``: where pixels under a filter lie, and if in the image.

    ``inside`` is None where all are.
    """
    shape = plan.shape
    chunks, (_, kernel_w) = plan.channel_chunks, shape.kernel

    def locator(row) -> Callable:
        pixel = T.bind(tirx.min(first_row + row, plan.rows - 1))
        if shape.is_pointwise:
            start = T.bind(pixel * shape.channels)
            return lambda chunk: (start + chunk * CHUNK, None)
        pixels = shape.out_height * shape.out_width
        image = T.bind(pixel // pixels)
        within = T.bind(pixel % pixels)
        top = T.bind(within // shape.out_width * shape.stride[0] - shape.padding[0])
        side = T.bind(within % shape.out_width * shape.stride[1] - shape.padding[1])

        def locate(chunk) -> tuple:
            tap = T.bind(chunk // chunks)
            y = T.bind(top + tap // kernel_w * shape.dilation[0])
            column = T.bind(side + tap % kernel_w * shape.dilation[1])
            inside = T.bind(
                tirx.And(tirx.And(y >= 0, y < shape.height), tirx.And(column >= 0, column < shape.width))
            )
            place = (
                (image * shape.height + y) * shape.width + column
            ) * shape.channels + chunk % chunks * CHUNK
            return T.bind(tirx.Select(inside, place, tirx.const(0, "int32"))), inside

        return locate

    return locator


def _pixel_reader(plan: ConvPlan, x, first_row) -> Callable:
    """``reader(row) -> read(chunk, target, at)`` for the pixels under a filter."""
    shape = plan.shape
    size = shape.batch * shape.height * shape.width * shape.channels
    aligned = next(n for n in (CHUNK, 4, 1) if shape.channels % n == 0)
    locator = pixel_locator(plan, first_row)

    def reader(row) -> Callable:
        locate = locator(row)

        def read(chunk, target, at) -> None:
            address, inside = locate(chunk)
            load_chunk(x, size, address, aligned, target, at)
            if inside is not None:
                for word in range(2):
                    kept = tirx.Select(inside, load(target, at + word, 1), tirx.const(0, "uint32"))
                    store(target, at + word, kept, 1)

        return read

    return reader


def _filter_reader(plan: ConvPlan, weights, first_column) -> Callable:
    """``reader(column) -> read(chunk, target, at)``."""
    size = plan.shape.out_channels * plan.depth

    def reader(column) -> Callable:
        start = T.bind(tirx.min(first_column + column, plan.shape.out_channels - 1) * plan.depth)
        return lambda chunk, target, at: load_chunk(weights, size, start + chunk * CHUNK, CHUNK, target, at)

    return reader


class _Operand:
    """One operand of a block: codes in registers, and two decoded steps in shared memory, ``(2, rows, WORDS)``."""

    def __init__(self, words: Callable, step: int, rows: int, threads: int, thread, reader: Callable) -> None:
        self.words, self.rows = words, rows
        self.shared = T.alloc_buffer((2 * rows * WORDS,), "uint32", scope="shared")
        self.chunks = chunks = step // CHUNK
        self.count = rows * chunks // threads
        self.chunk = T.bind(thread % chunks)
        self.places = [T.bind(thread // chunks + i * (threads // chunks)) for i in range(self.count)]
        self.codes = T.alloc_buffer((2 * self.count,), "uint32", scope="local")
        self.readers = [reader(place) for place in self.places]

    def fetch(self, step) -> None:
        """Load the codes of a step into registers."""
        for i, read in enumerate(self.readers):
            read(step * self.chunks + self.chunk, self.codes, 2 * i)

    def decode(self, half) -> None:
        """Write them to shared memory as tensor cores take them."""
        width = WORDS // self.chunks
        for i, place in enumerate(self.places):
            values = T.alloc_buffer((width,), "uint32", scope="local")
            words = [
                part for word in range(2) for part in self.words(T.bind(load(self.codes, 2 * i + word, 1)))
            ]
            for k, word in enumerate(words):
                store(values, k, word, 1)
            at = (half * self.rows + place) * WORDS + self.chunk * width
            store(self.shared, at, load(values, 0, width), width)

    def fragment(self, half, row, place, target, at: int) -> None:
        """The four words of ``row`` that a thread holds: pairs of the first and of the second step."""
        store(target, at, load(self.shared, (half * self.rows + row) * WORDS + place * 4, 4), 4)


class _Warp:
    """A warp's part of the tile: ``fragments * 16`` rows by ``WARP_COLUMNS`` columns."""

    def __init__(self, tile: Tile, thread) -> None:
        self.tile = tile
        self.warp, self.lane = T.bind(thread // 32), T.bind(thread % 32)
        self.group, self.place = T.bind(self.lane // 4), T.bind(self.lane % 4)
        self.row = T.bind(self.warp % tile.warps_down * (tile.fragments * MMA_ROWS))
        self.column = T.bind(self.warp // tile.warps_down * WARP_COLUMNS)
        self.columns = WARP_COLUMNS // FRAGMENT

    def multiply(self, left: _Operand, right: _Operand, half, sums: Any) -> None:
        """Add one step. A thread's columns of all fragments are neighbours: fragment j has 2j and 2j + 1 of its 8."""
        b = T.alloc_buffer((4 * self.columns,), "uint32", scope="local")
        for j in range(self.columns):
            own = self.group // 2 * FRAGMENT + 2 * j + self.group % 2
            right.fragment(half, self.column + own, self.place, b, 4 * j)
        for i in range(self.tile.fragments):
            a = T.alloc_buffer((8,), "uint32", scope="local")
            for h in range(2):
                row = self.row + i * MMA_ROWS + h * 8 + self.group
                left.fragment(half, row, self.place, a, 4 * h)
            for j in range(self.columns):
                for s in range(2):
                    rows = [load(a, word, 1) for word in (2 * s, 4 + 2 * s, 2 * s + 1, 5 + 2 * s)]
                    pair = [load(b, 4 * j + 2 * s + k, 1) for k in range(2)]
                    sums.add((i * self.columns + j) * 4, rows, pair)

    def finish(self, sums: Any, first_row, first_column, rows: int, columns: int, epilogue) -> None:
        """Pass the sums through shared memory, so that neighbouring threads finish neighbouring columns."""
        warps = self.tile.threads // 32
        patch = MMA_ROWS * WARP_COLUMNS
        shared = T.alloc_buffer((warps * patch,), sums.dtype, scope="shared")
        column = T.bind(tirx.min(first_column + self.column + self.lane, columns - 1))
        for i in range(self.tile.fragments):
            for j in range(self.columns):
                for h in range(2):
                    for e in range(2):
                        place = (h * 8 + self.group) * WARP_COLUMNS + self.place * FRAGMENT + 2 * j + e
                        value = sums.value((i * self.columns + j) * 4 + 2 * h + e)
                        store(shared, self.warp * patch + place, value, 1)
            with T.serial(0, MMA_ROWS) as r:
                row = T.bind(tirx.min(first_row + self.row + i * MMA_ROWS + r, rows - 1))
                value = T.bind(load(shared, self.warp * patch + r * WARP_COLUMNS + self.lane, 1))
                epilogue(value, row, column, 1)
