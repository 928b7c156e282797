"""Dense layers with up to eight rows: weights are read once, as codes, and decoded in registers.

What bounds these is reading the weights, so nothing else may take longer. A warp takes 16 output channels, its lanes 16
codes each of two of them, four neighbouring lanes a run of 64. A tensor core's step multiplies 16 by 8 columns: the
weights are its left operand, and up to eight rows of activations its right one. The warps of a block share the
reduction, so that enough loads are on their way, and add their int32 sums at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.cuda.device import MMA_COLUMNS, MMA_ROWS, decode_pairs, grid_exponent, mma
from tvm_qfp8.topi.cuda.exact_blocks import exact_steps
from tvm_qfp8.topi.cuda.gemm import Accumulators, words_of
from tvm_qfp8.topi.gemm import GemmShape
from tvm_qfp8.topi.panels import round_up
from tvm_qfp8.topi.prim_func import load, store

RUN = 64
"""Codes of a channel that a warp reads at once."""
LANE = 16
"""Of these, codes of one lane."""


@dataclass(frozen=True)
class GemvPlan:
    """How the reduction is shared: ``warps`` a block, each taking ``runs`` neighbouring runs in turn."""

    shape: GemmShape
    warps: int
    runs: int
    exact_turns: int
    """Turns after which accumulators go to int32; 0: they do after every run."""

    @property
    def turns(self) -> int:
        return -(-self.shape.depth // (RUN * self.warps * self.runs))

    @property
    def depth(self) -> int:
        """Codes of a stored channel, the last ones zero."""
        return self.turns * RUN * self.warps * self.runs


def plan_gemv(shape: GemmShape, codes: np.ndarray) -> GemvPlan | None:
    """The plan for codes ``(columns, depth)``; None for more rows than fit, or rows that are not whole vectors."""
    if shape.rows > MMA_COLUMNS or shape.depth % LANE:
        return None
    runs_in_all = -(-shape.depth // RUN)
    activation, weight = shape.layouts()
    exact = exact_steps(pack_weights(codes, round_up(shape.depth, RUN)), weight, activation, RUN)
    choices = [
        (warps, runs)
        for warps in (8, 4, 2, 1)
        for runs in (4, 3, 2, 1)
        if warps * runs <= round_up(runs_in_all, 2)
    ]
    if not exact:
        return None
    warps, runs = min(choices, key=lambda c: (round_up(runs_in_all, c[0] * c[1]), -c[0] * c[1]))
    return GemvPlan(shape, warps, runs, _exact_turns(shape, codes, warps, runs))


def _exact_turns(shape: GemmShape, codes: np.ndarray, warps: int, runs: int) -> int:
    """Turns that stay exact, in the order in which each warp takes them."""
    draft = GemvPlan(shape, warps, runs, 1)
    stored = pack_weights(codes, draft.depth).reshape(len(codes), draft.turns, warps, runs * RUN)
    by_warp = stored.transpose(0, 2, 1, 3).reshape(len(codes) * warps, draft.turns * runs * RUN)
    activation, weight = shape.layouts()
    return exact_steps(by_warp, weight, activation, runs * RUN)


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
            row = T.bind(tirx.min(group, shape.rows - 1) * shape.depth)
            sums = Accumulators(4, exponent, one_block=False)
            stored = words_of(weights, shape.columns * plan.depth)
            read = words_of(x, shape.rows * shape.depth)
            codes = T.alloc_buffer((3 * 4 * plan.runs,), "uint32", scope="local")
            with T.serial(0, plan.turns) as turn:
                first = T.bind(((turn * plan.warps + warp) * plan.runs) * RUN)
                for run in range(plan.runs):
                    for h in range(2):
                        at = (starts[h] + first + run * RUN) // 4
                        store(codes, (3 * run + h) * 4, load(stored, at, 4), 4)
                    # Beyond the last activation weights are zero, and anything may be read.
                    k = tirx.min(first + run * RUN + place * LANE, shape.depth - LANE)
                    store(codes, (3 * run + 2) * 4, load(read, (row + k) // 4, 4), 4)
                for run in range(plan.runs):
                    for word in range(4):
                        upper, lower, right = (
                            decode_pairs(T.bind(load(codes, (3 * run + part) * 4 + word, 1)), layout)
                            for part, layout in enumerate((weight, weight, activation))
                        )
                        left = [upper[0], lower[0], upper[1], lower[1]]
                        T.evaluate(mma(sums.floats, 0, left, list(right)))
                    if not plan.exact_turns:
                        sums.empty()
                if plan.exact_turns:
                    whole = tirx.floormod(turn, plan.exact_turns) == plan.exact_turns - 1
                    with T.If(tirx.Or(whole, turn == plan.turns - 1)):
                        with T.Then():
                            sums.empty()
            _finish(plan, sums, block, thread, warp, group, place, epilogue)


def _finish(
    plan: GemvPlan, sums: Accumulators, block, thread, warp, group, place, epilogue: Callable
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
