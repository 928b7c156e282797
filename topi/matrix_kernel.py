"""The register tile of instructions that multiply two rows by two columns at once (``smmla``).

Activations lie in pairs of rows, eight steps of one beside eight of the other: ``(rows / 2, depth / 8, 2, 8)``. An
accumulator holds ``[[row 0 column 0, row 0 column 1], [row 1 column 0, row 1 column 1]]``, and two of them the four
columns of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.format import Layout
from tvm_qfp8.topi.codec_parts import decode_parts
from tvm_qfp8.topi.float_contract import bind
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.micro_kernel import RegisterTile, reduce_steps
from tvm_qfp8.topi.prim_func import load, store
from tvm_qfp8.topi.split import Split

STEPS, BYTES = 8, 16
"""Reduction steps of one multiply-add, and the bytes of two rows or columns of them."""


def _take(parts: list, lanes: range | list[int]):
    return tirx.Shuffle(parts, [tirx.const(lane, "int32") for lane in lanes])


class MatrixTile(RegisterTile):
    """Accumulators of one tile: two for each pair of rows and vector of columns."""

    def reduce(
        self, activations, row_starts: list, steps: int, unroll: int, load_weights: Callable, product: int = 0
    ) -> None:
        """As ``RegisterTile.reduce``; ``row_starts`` are those of the pairs of rows."""

        def one_step(step) -> None:
            weights = [load_weights(step, vector) for vector in range(self.vectors)]
            columns = [bind(_take([w], range(h, h + BYTES))) for w in weights for h in (0, BYTES)]
            for index, start in enumerate(row_starts):
                rows = T.bind(load(activations, start + step * BYTES, BYTES))
                for half, pair_of_columns in enumerate(columns):
                    at = self._at(2 * index + half % 2, half // 2, product)
                    total = self.isa.multiply_add(load(self._buffer, at, 4), rows, pair_of_columns)
                    store(self._buffer, at, total, 4)

        reduce_steps(steps, unroll, one_step)

    def value(self, row: int, vector: int):
        even = row - row % 2
        first, second = (RegisterTile.value(self, even + half, vector) for half in (0, 1))
        at = 2 * (row % 2)
        return bind(_take([first, second], [at, at + 1, 4 + at, 5 + at]))


def register_tile(isa: InstructionSet, rows: int, vectors: int) -> RegisterTile:
    """The tile that fits the instruction set's multiply-add."""
    return (MatrixTile if isa.row_group > 1 else RegisterTile)(isa, rows, vectors)


def decode_row_of_pair(
    layout: Layout,
    split: Split,
    names: Sequence[str],
    x,
    x_at,
    scratch,
    row,
    depth: int,
    stored_depth: int,
    part_size: int,
) -> None:
    """The parts of ``depth`` codes of one row, at its places between those of its neighbour."""
    base = T.bind((row - row % 2) * stored_depth + (row % 2) * STEPS)

    def emit(offset, lanes: int) -> None:
        for index, part in enumerate(decode_parts(load(x, x_at + offset, lanes), layout, split, names)):
            at = base + index * part_size + offset // STEPS * BYTES + offset % STEPS
            store(scratch, at, part if lanes <= STEPS else _take([part], range(STEPS)), min(lanes, STEPS))
            if lanes > STEPS:
                store(scratch, at + BYTES, _take([part], range(STEPS, lanes)), STEPS)

    with T.serial(0, depth // BYTES) as block:
        emit(block * BYTES, BYTES)
    offset = depth // BYTES * BYTES
    while offset < depth:
        lanes = min(STEPS, 1 << ((depth - offset).bit_length() - 1))
        emit(offset, lanes)
        offset += lanes
    for place in range(depth, stored_depth):
        for part in range(len(names)):
            at = base + part * part_size + place // STEPS * BYTES + place % STEPS
            store(scratch, at, tirx.const(0, "int8"), 1)
