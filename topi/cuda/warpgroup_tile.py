"""What kernels on Hopper's tensor cores share: where a thread stands, loads of both operands, and the way of the sums.

The reduction goes by runs. A thread loads 16 codes at once: of pixels where they lie, of filters from runs of eight
columns that lie together, so that a warp loads whole cache lines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.cuda import warpgroup
from tvm_qfp8.topi.cuda.conv_plan import GROUP_LOAD, GroupPlan
from tvm_qfp8.topi.cuda.gemm import pixel_locator, words_of
from tvm_qfp8.topi.panels import round_up
from tvm_qfp8.topi.prim_func import load, store

TOGETHER = 8
"""Columns whose runs lie together."""
PATCH_COLUMNS = 32
PATCH = 16 * PATCH_COLUMNS
"""Sums that a warp passes on at once."""


def pack_runs(codes: np.ndarray, order: np.ndarray) -> np.ndarray:
    """``(out_channels, depth)`` -> ``(out_channels / 8, runs, 8, run)``, runs in ``order``, missing columns zero."""
    columns, depth = codes.shape
    run = len(order)
    padded = np.pad(codes, ((0, round_up(columns, TOGETHER) - columns), (0, 0)))
    runs = padded.reshape(-1, TOGETHER, depth // run, run)[..., order]
    return np.ascontiguousarray(runs.transpose(0, 2, 1, 3))


class Block:
    """Where a thread stands in its block, and the block in the output."""

    def __init__(self, plan: GroupPlan, thread, first_row, first_column) -> None:
        self.plan, self.tile, self.thread = plan, plan.group_tile, thread
        self.first_row, self.first_column = first_row, first_column
        self.warp, self.lane = T.bind(thread // 32), T.bind(thread % 32)
        self.group, self.place = T.bind(self.lane // 4), T.bind(self.lane % 4)


class PixelLoads:
    """Loads of the two rows of pixels that a thread has."""

    def __init__(self, block: Block, x) -> None:
        shape = block.plan.shape
        self._size = shape.batch * shape.height * shape.width * shape.channels
        self._x = words_of(x, self._size)
        locator = pixel_locator(block.plan, block.first_row)
        self._locators = [locator(block.warp * 16 + block.group + 8 * half) for half in range(2)]

    def load(self, row: int, chunk, target, at: int) -> None:
        """16 codes from ``chunk`` of row 0 or 1 to four words of ``target``."""
        address, inside = self._locators[row](chunk)
        # Beyond the last channel filters are zero, and anything may be read.
        start = T.bind(tirx.min(address, tirx.const(self._size - GROUP_LOAD, "int32")) // 4)
        store(target, at, load(self._x, start, 4), 4)
        if inside is not None:
            for word in range(at, at + 4):
                kept = tirx.Select(inside, load(target, word, 1), tirx.const(0, "uint32"))
                store(target, word, kept, 1)


class FilterRuns:
    """Runs of filters as ``pack_runs`` stores them, and their buffers in shared memory."""

    def __init__(self, block: Block, weights, base, run: int, buffers: int) -> None:
        plan, tile, pieces = block.plan, block.tile, run // GROUP_LOAD
        self._base, self._buffers = T.bind(base), buffers
        self._bytes, self._words = tile.columns * warpgroup.ROW_BYTES, TOGETHER * run // 4
        self.stored = words_of(weights, round_up(plan.shape.out_channels, TOGETHER) * plan.depth)
        self.piece = T.bind(block.thread % pieces)
        """Of a column's run, which load is the thread's; and the columns of the tile whose it has."""
        self.columns = [
            T.bind(block.thread // pieces + i * (tile.threads // pieces))
            for i in range(tile.columns * pieces // tile.threads)
        ]
        self._starts = []
        for own in self.columns:
            column = T.bind(tirx.min(block.first_column + own, plan.shape.out_channels - 1))
            within = column % TOGETHER * run + self.piece * GROUP_LOAD
            self._starts.append(T.bind((column // TOGETHER * (TOGETHER * plan.depth) + within) // 4))

    def starts(self, run) -> list:
        """The words from which the thread loads a run, one for each of its columns."""
        first = T.bind(run * self._words)
        return [start + first for start in self._starts]

    def buffer(self, run):
        """The address of a run in shared memory."""
        return self._base + tirx.Cast("uint32", tirx.floormod(run, self._buffers) * self._bytes)

    @staticmethod
    def offset(column, chunk):
        """Where 16 bytes of a column lie in a buffer."""
        swizzled = tirx.bitwise_xor(chunk, tirx.bitwise_and(column, 7))
        return T.bind(tirx.Cast("uint32", column * warpgroup.ROW_BYTES + swizzled * 16))


def finish_tile(block: Block, sums: Any, shared, epilogue: Callable) -> None:
    """Pass sums through shared memory, so that neighbouring threads finish neighbouring columns."""
    plan, tile = block.plan, block.tile
    values = T.decl_buffer((tile.threads // 32 * PATCH,), sums.dtype, data=shared.data)
    for part in range(tile.columns // PATCH_COLUMNS):
        for j in range(PATCH_COLUMNS // 8):
            for h in range(2):
                for e in range(2):
                    at = (h * 8 + block.group) * PATCH_COLUMNS + 8 * j + 2 * block.place + e
                    value = sums.value((part * (PATCH_COLUMNS // 8) + j) * 4 + 2 * h + e)
                    store(values, block.warp * PATCH + at, value, 1)
        last = plan.shape.out_channels - 1
        column = T.bind(tirx.min(block.first_column + part * PATCH_COLUMNS + block.lane, last))
        with T.serial(0, 16) as r:
            row = T.bind(tirx.min(block.first_row + block.warp * 16 + r, plan.rows - 1))
            value = T.bind(load(values, block.warp * PATCH + r * PATCH_COLUMNS + block.lane, 1))
            epilogue(value, row, column, 1)
