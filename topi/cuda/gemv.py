"""Dense layers with few rows, or with few outputs: weights are read as codes and decoded in registers.

With up to eight rows what bounds these is reading the weights, so nothing else may take longer. With more, but too few
tiles of the other kernels to keep a GPU busy, it is the length of the reduction that one thread goes through. A warp
takes 16 output channels, its lanes 16 codes each of two of them, four neighbouring lanes a run of 64. A tensor core's
step multiplies 16 by 8 columns: the weights are its left operand, and eight rows of activations its right one. The
warps of a block share the reduction, all loads of a turn are on their way before the first is used, and int32 sums are
added at the end. Activations are decoded once a block, into shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.cuda.conv_plan import GROUP_BLOCKS, GROUP_TILES
from tvm_qfp8.topi.cuda.device import (
    COUNTED,
    MMA_COLUMNS,
    MMA_DEPTH,
    MMA_ROWS,
    counting_start,
    decode_pairs,
    grid_exponent,
    mma,
    mma_count,
)
from tvm_qfp8.topi.cuda.gemm import Accumulators, words_of
from tvm_qfp8.topi.exact_sums import exact_steps
from tvm_qfp8.topi.gemm import GemmShape
from tvm_qfp8.topi.panels import round_up
from tvm_qfp8.topi.prim_func import load, store

RUN = 64
"""Codes of a channel that a warp reads at once."""
LANE = 16
"""Of these, codes of one lane."""
MOST_SHARED = 40 * 1024
"""Activations that fit into shared memory as float16: 80 KiB of the 99 that a block gets from sm_80 on."""
STATIC_SHARED = 12 * 1024
"""Of these, what fits, beside sums, into the part that needs no asking for."""
FRAGMENTS = (4, 2, 1)
"""Times eight rows of a block: weights are decoded once for all of them."""
PADDING = 4
"""Words between rows there, so that two rows do not share banks."""


@dataclass(frozen=True)
class GemvPlan:
    """How the reduction is shared: ``warps`` a block, each taking ``runs`` neighbouring runs in turn."""

    shape: GemmShape
    warps: int
    runs: int
    counted: bool
    """Sums of one step can be counted as they leave the tensor core."""
    exact: int = RUN
    """Codes, a run or one step, after which accumulators go to int32 where sums are not counted."""
    fragments: int = 1
    """Times eight rows of a block."""

    @property
    def tile_rows(self) -> int:
        """Rows of a block."""
        return min(self.fragments * MMA_COLUMNS, self.shape.rows)

    @property
    def turns(self) -> int:
        return -(-self.shape.depth // (RUN * self.warps * self.runs))

    @property
    def depth(self) -> int:
        """Codes of a stored channel, the last ones zero."""
        return self.turns * RUN * self.warps * self.runs


def plan_gemv(shape: GemmShape, codes: np.ndarray) -> GemvPlan | None:
    """The plan for codes ``(columns, depth)``; None where other kernels have tiles enough, or rows do not fit."""
    fragments = _fragments(shape)
    if fragments == 0 or shape.depth % LANE:
        return None
    runs_in_all = -(-shape.depth // RUN)
    activation, weight = shape.layouts()
    padded = pack_weights(codes, round_up(shape.depth, RUN))
    exact = [step for step in (RUN, MMA_DEPTH) if exact_steps(padded, weight, activation, step)]
    if not exact:
        return None
    choices = [
        (warps, runs)
        for warps in (8, 4, 2, 1)
        for runs in (8, 6, 4, 3, 2, 1)
        if warps * runs <= round_up(runs_in_all, 2)
    ]
    warps, runs = min(choices, key=lambda c: (round_up(runs_in_all, c[0] * c[1]), -c[0] * c[1]))
    counted = exact_steps(padded, weight, activation, MMA_DEPTH, COUNTED) > 0
    return GemvPlan(shape, warps, runs, counted, exact[0], fragments)


def _fragments(shape: GemmShape) -> int:
    """The most for which blocks keep a GPU busy and activations fit; 0 where none fit or other kernels are better."""
    smallest = GROUP_TILES[-1]
    tiles = -(-shape.rows // smallest.rows) * -(-shape.columns // smallest.columns)
    if shape.rows > MMA_COLUMNS and tiles >= GROUP_BLOCKS:
        return 0
    for fragments in FRAGMENTS:
        rows = fragments * MMA_COLUMNS
        busy = -(-shape.rows // rows) * -(-shape.columns // MMA_ROWS) >= GROUP_BLOCKS
        fits = min(rows, shape.rows) * shape.depth <= MOST_SHARED
        if fits and (fragments == 1 or (busy and shape.rows > rows // 2)):
            return fragments
    return 0


def pack_weights(codes: np.ndarray, depth: int) -> np.ndarray:
    """Codes ``(columns, depth)`` padded with code 0."""
    return np.pad(codes, ((0, 0), (0, depth - codes.shape[1])))


def emit_gemv(plan: GemvPlan, x, weights, epilogue: Callable) -> None:
    """Emit the kernel; ``epilogue(sum, row, column, valid)``."""
    shape = plan.shape
    activation, weight = shape.layouts()
    exponent = grid_exponent(activation) + grid_exponent(weight)
    threads = 32 * plan.warps
    with T.launch_thread("blockIdx.x", -(-shape.columns // MMA_ROWS)) as block:
        with T.launch_thread("blockIdx.y", -(-shape.rows // plan.tile_rows)) as block_row:
            with T.launch_thread("threadIdx.x", threads) as thread:
                warp, lane = T.bind(thread // 32), T.bind(thread % 32)
                group, place = T.bind(lane // 4), T.bind(lane % 4)
                columns = [tirx.min(block * MMA_ROWS + h * 8 + group, shape.columns - 1) for h in range(2)]
                starts = [T.bind(column * plan.depth + place * LANE) for column in columns]
                sums = [
                    _Counter(plan, exponent) if plan.counted else _Emptied(exponent, plan.exact)
                    for _ in range(plan.fragments)
                ]
                stored = words_of(weights, shape.columns * plan.depth)
                codes = T.alloc_buffer((2 * 4 * plan.runs,), "uint32", scope="local")

                def fetch(turn) -> None:
                    first = T.bind(((turn * plan.warps + warp) * plan.runs) * RUN)
                    for run in range(plan.runs):
                        for h in range(2):
                            at = (starts[h] + first + run * RUN) // 4
                            store(codes, (2 * run + h) * 4, load(stored, at, 4), 4)

                fetch(0)
                first_row = T.bind(block_row * plan.tile_rows)
                shared, stride = _decode_rows(plan, x, first_row, thread)
                rows = [
                    T.bind(tirx.min(group + MMA_COLUMNS * part, plan.tile_rows - 1) * stride)
                    for part in range(plan.fragments)
                ]
                with T.serial(0, plan.turns) as turn:
                    first = T.bind(((turn * plan.warps + warp) * plan.runs) * RUN)
                    for run in range(plan.runs):
                        # Beyond the last activation weights are zero, and anything may be read.
                        k = T.bind(tirx.min(first + run * RUN + place * LANE, shape.depth - LANE) // 2)
                        pairs = T.alloc_buffer((8 * plan.fragments,), "uint32", scope="local")
                        for part, row in enumerate(rows):
                            for half in range(0, 8, 4):
                                store(pairs, 8 * part + half, load(shared, row + k + half, 4), 4)
                        for word in range(4):
                            upper, lower = (
                                decode_pairs(T.bind(load(codes, (2 * run + h) * 4 + word, 1)), weight)
                                for h in range(2)
                            )
                            left = [T.bind(v) for v in (upper[0], lower[0], upper[1], lower[1])]
                            for part in range(plan.fragments):
                                at = 8 * part + 2 * word
                                sums[part].add(left, [load(pairs, at + i, 1) for i in range(2)])
                                sums[part].end_of(MMA_DEPTH)
                        for part in range(plan.fragments):
                            sums[part].end_of(RUN)
                    if plan.turns > 1:
                        fetch(tirx.min(turn + 1, plan.turns - 1))
                _finish(plan, sums, block, first_row, thread, warp, group, place, epilogue)


class _Emptied:
    """Sums of ``exact`` codes in float32, then in int32."""

    def __init__(self, exponent: int, exact: int) -> None:
        self._sums, self._exact = Accumulators(4, exponent, one_block=False), exact

    def add(self, left: list, right: list) -> None:
        """Add a product."""
        T.evaluate(mma(self._sums.floats, 0, left, right))

    def end_of(self, codes: int) -> None:
        """After so many codes."""
        if codes == self._exact:
            self._sums.empty()

    def value(self, index: int):
        """A sum as int32."""
        return self._sums.value(index)


class _Counter:
    """Sums in int32, added up from the bits in which products leave the tensor core."""

    def __init__(self, plan: GemvPlan, exponent: int) -> None:
        self._start = counting_start(exponent)
        bits = int(np.float32(self._start).view(np.int32))
        products = plan.turns * plan.runs * (RUN // MMA_DEPTH)
        before = -(bits * products) % 2**32
        self._totals = T.alloc_buffer((4,), "int32", scope="local")
        for index in range(4):
            store(self._totals, index, tirx.const(before - 2**32 * (before >= 2**31), "int32"), 1)

    def add(self, left: list, right: list) -> None:
        """Add a product."""
        T.evaluate(mma_count(self._totals, self._start, left, right))

    def end_of(self, codes: int) -> None:
        """Nothing is left to do."""

    def value(self, index: int):
        """A sum as int32."""
        return load(self._totals, index, 1)


def _decode_rows(plan: GemvPlan, x, first_row, thread):
    """Activations as float16 pairs in shared memory, as a lane's codes give them; and the words of a row."""
    shape, rows = plan.shape, plan.tile_rows
    stride, pieces, threads = shape.depth // 2 + PADDING, shape.depth // LANE, 32 * plan.warps
    scope = "shared" if rows * shape.depth <= STATIC_SHARED else "shared.dyn"
    shared = T.alloc_buffer((rows * stride,), "uint32", scope=scope)
    read = words_of(x, shape.rows * shape.depth)

    def decode(part) -> None:
        piece = T.bind(tirx.min(thread + part, rows * pieces - 1))
        at = T.bind(piece // pieces * stride + piece % pieces * (LANE // 2))
        row = tirx.min(first_row + piece // pieces, shape.rows - 1)
        codes = T.alloc_buffer((4,), "uint32", scope="local")
        store(codes, 0, load(read, (row * pieces + piece % pieces) * (LANE // 4), 4), 4)
        pairs = T.alloc_buffer((8,), "uint32", scope="local")
        for word in range(4):
            for k, pair in enumerate(decode_pairs(T.bind(load(codes, word, 1)), shape.layouts()[0])):
                store(pairs, 2 * word + k, pair, 1)
        for half in range(2):
            store(shared, at + 4 * half, load(pairs, 4 * half, 4), 4)

    _by_all(rows * pieces, threads, decode)
    return shared, stride


def _by_all(count: int, threads: int, body: Callable) -> None:
    """``body(start)`` for every ``threads`` of ``count`` pieces."""
    if count <= threads:
        body(0)
        return
    with T.serial(0, -(-count // threads)) as turn:
        body(turn * threads)


def _finish(
    plan: GemvPlan, sums: list, block, first_row, thread, warp, group, place, epilogue: Callable
) -> None:
    """Add what the warps found; then a thread finishes one output."""
    shape = plan.shape
    patch = MMA_ROWS * MMA_COLUMNS * plan.fragments
    outputs = plan.tile_rows * MMA_ROWS
    shared = T.alloc_buffer((plan.warps * patch,), "int32", scope="shared")
    for part in range(plan.fragments):
        for h in range(2):
            for e in range(2):
                row = part * MMA_COLUMNS + 2 * place + e
                store(shared, warp * patch + row * MMA_ROWS + h * 8 + group, sums[part].value(2 * h + e), 1)

    def finish(start) -> None:
        own = T.bind(tirx.min(thread + start, outputs - 1))
        total = load(shared, own, 1)
        for other in range(1, plan.warps):
            total = total + load(shared, other * patch + own, 1)
        column = T.bind(tirx.min(block * MMA_ROWS + own % MMA_ROWS, shape.columns - 1))
        row = T.bind(tirx.min(first_row + own // MMA_ROWS, shape.rows - 1))
        epilogue(T.bind(total), row, column, 1)

    _by_all(outputs, 32 * plan.warps, finish)
