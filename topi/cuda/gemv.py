"""Dense layers with up to eight rows: weights are read once, as codes, and decoded in registers.

What bounds these is reading the weights, so nothing else may take longer. A warp takes 16 output channels, its lanes 16
codes each of two of them, four neighbouring lanes a run of 64. A tensor core's step multiplies 16 by 8 columns: the
weights are its left operand, and up to eight rows of activations its right one. The warps of a block share the
reduction, all loads of a turn are on their way before the first is used, and int32 sums are added at the end.
Activations are decoded once a block, into shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

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
from tvm_qfp8.topi.cuda.exact_blocks import exact_steps
from tvm_qfp8.topi.cuda.gemm import Accumulators, words_of
from tvm_qfp8.topi.gemm import GemmShape
from tvm_qfp8.topi.panels import round_up
from tvm_qfp8.topi.prim_func import load, store

RUN = 64
"""Codes of a channel that a warp reads at once."""
LANE = 16
"""Of these, codes of one lane."""
MOST_SHARED = 40 * 1024
"""Activations that fit into shared memory as float16: 80 KiB of the 99 that a block gets from sm_80 on."""
STATIC_SHARED = 16 * 1024
"""Of these, what fits into the part that needs no asking for."""
PADDING = 4
"""Words between rows there, so that two rows do not share banks."""


@dataclass(frozen=True)
class GemvPlan:
    """How the reduction is shared: ``warps`` a block, each taking ``runs`` neighbouring runs in turn."""

    shape: GemmShape
    warps: int
    runs: int
    counted: bool
    """Sums of one step can be counted as they leave the tensor core; else accumulators go to int32 after every run."""

    @property
    def turns(self) -> int:
        return -(-self.shape.depth // (RUN * self.warps * self.runs))

    @property
    def depth(self) -> int:
        """Codes of a stored channel, the last ones zero."""
        return self.turns * RUN * self.warps * self.runs


def plan_gemv(shape: GemmShape, codes: np.ndarray) -> GemvPlan | None:
    """The plan for codes ``(columns, depth)``; None for more rows than fit, or rows that are not whole vectors."""
    if shape.rows > MMA_COLUMNS or shape.depth % LANE or shape.rows * shape.depth > MOST_SHARED:
        return None
    runs_in_all = -(-shape.depth // RUN)
    activation, weight = shape.layouts()
    exact = exact_steps(pack_weights(codes, round_up(shape.depth, RUN)), weight, activation, RUN)
    choices = [
        (warps, runs)
        for warps in (8, 4, 2, 1)
        for runs in (8, 6, 4, 3, 2, 1)
        if warps * runs <= round_up(runs_in_all, 2)
    ]
    if not exact:
        return None
    warps, runs = min(choices, key=lambda c: (round_up(runs_in_all, c[0] * c[1]), -c[0] * c[1]))
    depth = round_up(shape.depth, RUN)
    counted = exact_steps(pack_weights(codes, depth), weight, activation, MMA_DEPTH, COUNTED) > 0
    return GemvPlan(shape, warps, runs, counted)


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
        with T.launch_thread("threadIdx.x", threads) as thread:
            warp, lane = T.bind(thread // 32), T.bind(thread % 32)
            group, place = T.bind(lane // 4), T.bind(lane % 4)
            columns = [tirx.min(block * MMA_ROWS + h * 8 + group, shape.columns - 1) for h in range(2)]
            starts = [T.bind(column * plan.depth + place * LANE) for column in columns]
            sums = _Counter(plan, exponent) if plan.counted else _Emptied(exponent)
            stored = words_of(weights, shape.columns * plan.depth)
            codes = T.alloc_buffer((2 * 4 * plan.runs,), "uint32", scope="local")

            def fetch(turn) -> None:
                first = T.bind(((turn * plan.warps + warp) * plan.runs) * RUN)
                for run in range(plan.runs):
                    for h in range(2):
                        at = (starts[h] + first + run * RUN) // 4
                        store(codes, (2 * run + h) * 4, load(stored, at, 4), 4)

            fetch(0)
            shared, stride = _decode_rows(plan, x, thread)
            row = T.bind(tirx.min(group, shape.rows - 1) * stride)
            with T.serial(0, plan.turns) as turn:
                first = T.bind(((turn * plan.warps + warp) * plan.runs) * RUN)
                for run in range(plan.runs):
                    # Beyond the last activation weights are zero, and anything may be read.
                    k = tirx.min(first + run * RUN + place * LANE, shape.depth - LANE)
                    pairs = T.alloc_buffer((8,), "uint32", scope="local")
                    for half in range(2):
                        store(pairs, 4 * half, load(shared, row + k // 2 + 4 * half, 4), 4)
                    for word in range(4):
                        upper, lower = (
                            decode_pairs(T.bind(load(codes, (2 * run + h) * 4 + word, 1)), weight)
                            for h in range(2)
                        )
                        left = [upper[0], lower[0], upper[1], lower[1]]
                        right = [load(pairs, 2 * word + part, 1) for part in range(2)]
                        sums.add(left, right)
                    sums.end_run()
                if plan.turns > 1:
                    fetch(tirx.min(turn + 1, plan.turns - 1))
            _finish(plan, sums, block, thread, warp, group, place, epilogue)


class _Emptied:
    """Sums of a run in float32, then in int32."""

    def __init__(self, exponent: int) -> None:
        self._sums = Accumulators(4, exponent, one_block=False)

    def add(self, left: list, right: list) -> None:
        """Add a product."""
        T.evaluate(mma(self._sums.floats, 0, left, right))

    def end_run(self) -> None:
        """After every run."""
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

    def end_run(self) -> None:
        """Nothing is left to do."""

    def value(self, index: int):
        """A sum as int32."""
        return load(self._totals, index, 1)


def _decode_rows(plan: GemvPlan, x, thread):
    """Activations as float16 pairs in shared memory, as a lane's codes give them; and the words of a row."""
    shape = plan.shape
    stride, pieces, threads = shape.depth // 2 + PADDING, shape.depth // LANE, 32 * plan.warps
    scope = "shared" if shape.rows * shape.depth <= STATIC_SHARED else "shared.dyn"
    shared = T.alloc_buffer((shape.rows * stride,), "uint32", scope=scope)
    read = words_of(x, shape.rows * shape.depth)
    for part in range(0, shape.rows * pieces, threads):
        piece = T.bind(tirx.min(thread + part, shape.rows * pieces - 1))
        at = T.bind(piece // pieces * stride + piece % pieces * (LANE // 2))
        codes = T.alloc_buffer((4,), "uint32", scope="local")
        store(codes, 0, load(read, piece * (LANE // 4), 4), 4)
        pairs = T.alloc_buffer((8,), "uint32", scope="local")
        for word in range(4):
            for k, pair in enumerate(decode_pairs(T.bind(load(codes, word, 1)), shape.layouts()[0])):
                store(pairs, 2 * word + k, pair, 1)
        for half in range(2):
            store(shared, at + 4 * half, load(pairs, 4 * half, 4), 4)
    return shared, stride


def _finish(
    plan: GemvPlan, sums: _Counter | _Emptied, block, thread, warp, group, place, epilogue: Callable
) -> None:
    """Add what the warps found; then a thread finishes one output."""
    shape = plan.shape
    patch = MMA_ROWS * MMA_COLUMNS
    threads = 32 * plan.warps
    shared = T.alloc_buffer((plan.warps * patch,), "int32", scope="shared")
    for h in range(2):
        for e in range(2):
            at = warp * patch + (2 * place + e) * MMA_ROWS + h * 8 + group
            store(shared, at, sums.value(2 * h + e), 1)
    for part in range(0, shape.rows * MMA_ROWS, threads):
        own = T.bind(tirx.min(thread + part, shape.rows * MMA_ROWS - 1))
        total = load(shared, own, 1)
        for other in range(1, plan.warps):
            total = total + load(shared, other * patch + own, 1)
        column = T.bind(tirx.min(block * MMA_ROWS + own % MMA_ROWS, shape.columns - 1))
        epilogue(T.bind(total), T.bind(own // MMA_ROWS), column, 1)
