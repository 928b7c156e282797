"""Dense layers and convolutions on Hopper's tensor cores where grid values are int8: layouts E1M6 and UE1M7.

Weights are stored as int8 and copied to shared memory as they are; activations go to int8, where they are not uint8
already, in registers. Sums are int32, exact whatever the length. The loop is that of ``warpgroup_gemm.py`` otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.cuda import warpgroup
from tvm_qfp8.topi.cuda.conv_plan import CHUNK, GROUP_LOAD, INTEGER_RUN, IntegerGroupPlan, as_integers
from tvm_qfp8.topi.cuda.device import integers_of
from tvm_qfp8.topi.cuda.gemm import IntegerSums
from tvm_qfp8.topi.cuda.warpgroup_tile import PATCH, Block, FilterRuns, PixelLoads, finish_tile, pack_runs
from tvm_qfp8.topi.prim_func import load, store

STEPS = INTEGER_RUN // 32
"""Of a tensor core, 32 values each."""
HALF = INTEGER_RUN // 2
"""Codes that the four threads of a row load at once."""
BUFFERS = 4
"""Runs of filters in shared memory: one is multiplied, one may still be by slower warps, two are on their way."""


def order_of_run() -> np.ndarray:
    """Which of 128 codes lies at each place of a stored run.

    A step's 32 values are two halves of four words. Thread ``place`` of the left operand has the word ``place`` of
    both, and has loaded codes ``16 * place`` to ``16 * place + 15`` of each half of the run.
    """
    stored = np.arange(INTEGER_RUN)
    step, half, place, byte = stored // 32, stored % 32 // 16, stored % 16 // 4, stored % 4
    return step // 2 * HALF + place * GROUP_LOAD + 4 * (2 * (step % 2) + half) + byte


def pack_integers(codes: np.ndarray) -> np.ndarray:
    """Codes E1M6 ``(out_channels, depth)`` -> int8 bytes ``(out_channels / 8, runs, 8, 128)``, uint8."""
    return pack_runs(as_integers(codes), order_of_run())


def emit_integer_conv(plan: IntegerGroupPlan, x, weights, epilogue: Callable) -> None:
    """Emit the kernel; ``epilogue(sum, row, column, valid)`` finishes one value of output pixel ``row``."""
    shape, tile = plan.shape, plan.group_tile
    activation, _ = shape.layouts()
    runs = plan.depth // INTEGER_RUN
    with T.launch_thread("blockIdx.x", -(-plan.rows // tile.rows)) as block_row:
        with T.launch_thread("blockIdx.y", -(-shape.out_channels // tile.columns)) as block_column:
            with T.launch_thread("threadIdx.x", tile.threads) as thread:
                block = Block(plan, thread, block_row * tile.rows, block_column * tile.columns)
                bytes_in_all = BUFFERS * tile.columns * warpgroup.ROW_BYTES + warpgroup.ALIGNMENT
                words = max(bytes_in_all // 4, tile.threads // 32 * PATCH)
                shared = T.alloc_buffer((words,), "uint32", scope="shared.dyn")
                left = _Pixels(block, x, activation.signed)
                base = warpgroup.shared_address(shared)
                right = FilterRuns(block, weights, base, INTEGER_RUN, BUFFERS)
                sums = IntegerSums(tile.columns // 2)
                left.fetch(0)
                for run in range(2):
                    _copy(right, run, runs)
                T.evaluate(warpgroup.await_copies(1))
                T.evaluate(warpgroup.publish())
                with T.serial(0, runs) as run:
                    # The registers of the last products' left operand are needed again.
                    T.evaluate(warpgroup.await_products(0))
                    left.decode()
                    left.fetch(T.bind(tirx.min(run + 1, runs - 1)))
                    _copy(right, T.bind(run + 2), runs)
                    T.evaluate(warpgroup.begin_products())
                    at = T.bind(right.buffer(run))
                    for step in range(STEPS):
                        address = at + tirx.const(32 * step, "uint32")
                        operand = left.operand(step)
                        T.evaluate(
                            warpgroup.product(tile.columns, sums.integers, operand, address, left.kind)
                        )
                    T.evaluate(warpgroup.end_products())
                    T.evaluate(warpgroup.await_copies(1))
                    T.evaluate(warpgroup.publish())
                T.evaluate(warpgroup.await_products(0))
                T.evaluate(warpgroup.await_copies(0))
                T.evaluate(warpgroup.publish())
                finish_tile(block, sums, shared, epilogue)


class _Pixels:
    """The left operand: a run as the tensor cores take it, and codes of the next one."""

    def __init__(self, block: Block, x, signed: bool) -> None:
        self.block, self.signed, self.kind = block, signed, "s8" if signed else "u8"
        self.loads = PixelLoads(block, x)
        self.codes = T.alloc_buffer((16,), "uint32", scope="local")
        self.values = T.alloc_buffer((16,), "uint32", scope="local")

    def fetch(self, run) -> None:
        """Load the codes of a run: of each row 16 of either half."""
        for half in range(2):
            first = run * (INTEGER_RUN // CHUNK) + half * (HALF // CHUNK)
            chunk = T.bind(first + self.block.place * (GROUP_LOAD // CHUNK))
            for row in range(2):
                self.loads.load(row, chunk, self.codes, 8 * row + 4 * half)

    def decode(self) -> None:
        """Let the operands be what was loaded."""
        for word in range(16):
            value = load(self.codes, word, 1)
            store(self.values, word, integers_of(T.bind(value)) if self.signed else value, 1)

    def operand(self, step: int) -> list:
        """The four words of one step."""
        return [load(self.values, 8 * i + 2 * step + half, 1) for half in range(2) for i in range(2)]


def _copy(filters: FilterRuns, run, runs: int) -> None:
    """Begin to copy a run to its buffer; beyond the last one the last again, where nothing reads it."""
    target = T.bind(filters.buffer(run))
    starts = filters.starts(tirx.min(run, runs - 1))
    for column, start in zip(filters.columns, starts, strict=True):
        source = tirx.address_of(filters.stored[start])
        T.evaluate(warpgroup.copy_chunk(target + filters.offset(column, filters.piece), source))
    T.evaluate(warpgroup.end_copies())
