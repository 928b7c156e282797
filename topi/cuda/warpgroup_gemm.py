"""Dense layers and convolutions on Hopper's tensor cores; what ``gemm.py`` does elsewhere.

What bounds these is the traffic of shared memory, so only filters pass through it. A group of four warps makes 64 rows
of a tile; each thread decodes its pixels in registers, where tensor cores take them from. While they multiply one step
of 16 values, the next step's pixels and a quarter of the next run's filters are decoded.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.cuda import warpgroup
from tvm_qfp8.topi.cuda.conv_plan import CHUNK, GROUP_LOAD, GROUP_RUN, GroupPlan
from tvm_qfp8.topi.cuda.device import decode_pairs, grid_exponent
from tvm_qfp8.topi.cuda.warpgroup_tile import PATCH, Block, FilterRuns, PixelLoads, finish_tile, pack_runs
from tvm_qfp8.topi.prim_func import load, store

STEPS = GROUP_RUN // GROUP_LOAD
"""Of a tensor core; a thread has four codes of each of them among those that it loads at once."""
GROUP = 128
"""Threads whose products are one: four warps."""
BUFFERS = 3
"""Runs of filters in shared memory: one is multiplied, one may still be by slower warps, one is written."""


def order_of_run() -> np.ndarray:
    """Which of 64 codes lies at each place of a stored run, so that decoded words lie side by side as tensor cores ask.

    A step's 16 values are two chunks ``h`` of four pairs. Thread ``place`` of the left operand has the pair ``place``
    of both chunks, decoded from its codes ``4 * step + h`` and ``4 * step + h + 2``.
    """
    stored = np.arange(GROUP_RUN)
    step, word, byte = stored // GROUP_LOAD, stored % GROUP_LOAD // 4, stored % 4
    place = word % 2 * 2 + byte % 2
    return place * GROUP_LOAD + 4 * step + byte // 2 * 2 + word // 2


def pack_for_groups(codes: np.ndarray) -> np.ndarray:
    """Codes ``(out_channels, depth)`` of ``pack_weights`` -> ``(out_channels / 8, runs, 8, 64)``."""
    return pack_runs(codes, order_of_run())


def emit_group_conv(plan: GroupPlan, x, weights, epilogue: Callable) -> None:
    """Emit the kernel; ``epilogue(sum, row, column, valid)`` finishes one value of output pixel ``row``."""
    shape, tile = plan.shape, plan.group_tile
    activation, weight = shape.layouts()
    runs = plan.depth // GROUP_RUN
    exact = _exact_runs(plan)
    with T.launch_thread("blockIdx.x", -(-plan.rows // tile.rows)) as block_row:
        with T.launch_thread("blockIdx.y", -(-shape.out_channels // tile.columns)) as block_column:
            with T.launch_thread("threadIdx.x", tile.threads) as thread:
                block = Block(plan, thread, block_row * tile.rows, block_column * tile.columns)
                shared, totals = _shared_memory(plan, exact < runs)
                left = _Pixels(block, x)
                base = T.bind(warpgroup.shared_address(shared))
                right = _Filters(block, weights, base)
                exponent = grid_exponent(activation) + grid_exponent(weight)
                sums = _Sums(block, exponent, None if totals is None else base + totals)

                def multiply(run, parity: int) -> None:
                    left.fetch(T.bind(tirx.min(run + 1, runs - 1)), 1 - parity)
                    right.fetch(T.bind(tirx.min(run + 2, runs - 1)), parity)
                    left.decode(parity, 0)
                    at = T.bind(right.runs.buffer(run))
                    for step in range(STEPS):
                        address = at + tirx.const(2 * GROUP_LOAD * step, "uint32")
                        T.evaluate(warpgroup.begin_products())
                        T.evaluate(warpgroup.product(tile.columns, sums.floats, left.operand(step), address))
                        T.evaluate(warpgroup.end_products())
                        T.evaluate(warpgroup.await_products(1))
                        if step + 1 < STEPS:
                            left.decode(parity, step + 1)
                        right.decode(run + 1, 1 - parity, step)
                    if exact == 1 and totals is not None:
                        T.evaluate(warpgroup.await_products(0))
                        sums.empty()
                    T.evaluate(warpgroup.publish())

                left.fetch(0, 0)
                for run in range(2):
                    right.fetch(run, run)
                for step in range(STEPS):
                    right.decode(0, 0, step)
                T.evaluate(warpgroup.publish())
                with T.serial(0, runs // 2) as pair:
                    multiply(T.bind(2 * pair), 0)
                    multiply(T.bind(2 * pair + 1), 1)
                    if exact > 1 and totals is not None:
                        whole = tirx.floormod(pair, exact // 2) == exact // 2 - 1
                        with T.If(tirx.Or(whole, pair == runs // 2 - 1)):
                            with T.Then():
                                T.evaluate(warpgroup.await_products(0))
                                sums.empty()
                T.evaluate(warpgroup.await_products(0))
                sums.end()
                T.evaluate(warpgroup.publish())
                finish_tile(block, sums, shared, epilogue)


def _exact_runs(plan: GroupPlan) -> int:
    """Runs after which accumulators go to int32: 1, or an even number."""
    exact = plan.exact // GROUP_RUN
    return exact // 2 * 2 if exact > 1 else 1


def _shared_memory(plan: GroupPlan, with_totals: bool) -> tuple:
    """A buffer for decoded filters, then for int32 totals, later for sums on their way out; and where totals begin.

    Totals take no registers, so that two blocks fit on a multiprocessor, one of which computes while the other waits.
    """
    tile = plan.group_tile
    decoded = BUFFERS * tile.columns * warpgroup.ROW_BYTES
    size = decoded + (4 * tile.rows * tile.columns if with_totals else 0)
    words = max((size + warpgroup.ALIGNMENT) // 4, tile.threads // 32 * PATCH)
    shared = T.alloc_buffer((words,), "uint32", scope="shared.dyn")
    return shared, tirx.const(decoded, "uint32") if with_totals else None


class _Sums:
    """float32 accumulators of tensor cores, emptied into int32 totals before a sum could round."""

    def __init__(self, block: Block, exponent: int, totals) -> None:
        self.size, self.scale = block.tile.columns // 2, tirx.const(float(2**exponent), "float32")
        self.floats = T.alloc_buffer((self.size,), "float32", scope="local")
        self._stride = 4 * block.tile.threads
        self._totals = None if totals is None else T.bind(totals + tirx.Cast("uint32", block.thread * 4))
        self.dtype = "float32" if totals is None else "int32"
        for index in range(self.size):
            store(self.floats, index, tirx.const(0.0, "float32"), 1)
            if self._totals is not None:
                T.evaluate(warpgroup.store_word(self._total(index), tirx.const(0, "int32")))

    def _total(self, index: int):
        return self._totals + tirx.const(index * self._stride, "uint32")

    def empty(self) -> None:
        """Move the sums to the totals."""
        for index in range(self.size):
            exact = (load(self.floats, index, 1) * self.scale).astype("int32")
            T.evaluate(warpgroup.add_word(self._total(index), exact))
            store(self.floats, index, tirx.const(0.0, "float32"), 1)

    def end(self) -> None:
        """Let registers have what ``value`` gives; shared memory may be used for something else then."""
        if self._totals is not None:
            for index in range(self.size):
                total = T.bind(warpgroup.load_word(self._total(index)))
                store(self.floats, index, tirx.reinterpret("float32", total), 1)

    def value(self, index: int):
        """A sum, float32 or int32."""
        value = load(self.floats, index, 1)
        return value * self.scale if self._totals is None else tirx.reinterpret("int32", value)


class _Pixels:
    """The left operand: codes of two runs in registers, and two steps of them as float16 pairs."""

    def __init__(self, block: Block, x) -> None:
        assert block.plan.shape.activation is not None
        self.block, self.layout = block, block.plan.shape.activation
        self.loads = PixelLoads(block, x)
        self.codes = [T.alloc_buffer((8,), "uint32", scope="local") for _ in range(2)]
        self.pairs = [T.alloc_buffer((4,), "uint32", scope="local") for _ in range(2)]

    def fetch(self, run, parity: int) -> None:
        """Load the codes of a run."""
        chunk = T.bind(run * (GROUP_RUN // CHUNK) + self.block.place * (GROUP_LOAD // CHUNK))
        for row in range(2):
            self.loads.load(row, chunk, self.codes[parity], 4 * row)

    def decode(self, parity: int, step: int) -> None:
        """Decode one step of what was loaded."""
        for i in range(2):
            pairs = decode_pairs(T.bind(load(self.codes[parity], 4 * i + step, 1)), self.layout)
            for h, pair in enumerate(pairs):
                store(self.pairs[step % 2], 2 * h + i, pair, 1)

    def operand(self, step: int) -> list:
        """The four words of one step."""
        return [load(self.pairs[step % 2], word, 1) for word in range(4)]


class _Filters:
    """The right operand: codes of two runs in registers, and three decoded ones in shared memory."""

    def __init__(self, block: Block, weights, base) -> None:
        assert block.plan.shape.weight is not None
        self.layout = block.plan.shape.weight
        self.runs = FilterRuns(block, weights, base, GROUP_RUN, BUFFERS)
        words = 4 * len(self.runs.columns)
        self.codes = [T.alloc_buffer((words,), "uint32", scope="local") for _ in range(2)]

    def fetch(self, run, parity: int) -> None:
        """Load the codes of a run."""
        for i, start in enumerate(self.runs.starts(run)):
            store(self.codes[parity], 4 * i, load(self.runs.stored, start, 4), 4)

    def decode(self, run, parity: int, quarter: int) -> None:
        """Write a quarter of them to shared memory as float16."""
        chunks = [(i, h) for i in range(len(self.runs.columns)) for h in range(2)]
        for i, h in chunks[quarter::STEPS]:
            pairs: list = []
            for word in range(2):
                pairs += decode_pairs(T.bind(load(self.codes[parity], 4 * i + 2 * h + word, 1)), self.layout)
            offset = self.runs.offset(self.runs.columns[i], self.runs.piece * 2 + h)
            T.evaluate(warpgroup.store_chunk(self.runs.buffer(run) + offset, pairs))
