"""Transposition of matrices, by tiles that are turned in registers.

A tile of ``lanes x lanes`` values is read as rows and written as columns. Interleaving row i with row i + lanes / 2,
for all i, moves the highest bit of a row's number to the lowest of the column's; after log2(lanes) times the tile is
turned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.float_contract import bind, lanes_of
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import overlapped_start
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, load, store
from tvm_qfp8.topi.rows import MIN_PARALLEL_ELEMENTS

DTYPES = ("float32", "int32", "uint32", "float16", "int16", "uint16", "int8", "uint8")


@dataclass(frozen=True)
class TransposeShape:
    """``(outer, rows, columns)`` to ``(outer, columns, rows)``."""

    outer: int
    rows: int
    columns: int

    @classmethod
    def of(cls, shape: tuple[int, ...], axes: tuple[int, ...]) -> TransposeShape | None:
        """What ``numpy.transpose(x, axes)`` does to an ``x`` of this shape; None if it is no such transposition."""
        kept = [axis for axis in axes if shape[axis] != 1]
        order = sorted(kept)
        outer = 1
        while kept and order[0] == kept[0]:
            outer *= shape[kept[0]]
            del order[0], kept[0]
        if not kept:
            return None
        turn = order.index(kept[0])
        if kept != order[turn:] + order[:turn]:
            return None
        rows, columns = (math.prod(shape[axis] for axis in part) for part in (order[:turn], order[turn:]))
        return cls(outer, rows, columns)


def can_transpose(isa: InstructionSet, shape: TransposeShape, dtype: str) -> bool:
    """Whether tiles fit."""
    return dtype in DTYPES and shape.outer > 0 and min(shape.rows, shape.columns) >= isa.lanes


def transpose_prim_func(
    isa: InstructionSet, threads: int, shape: TransposeShape, x: TensorSpec, y: TensorSpec
) -> tirx.PrimFunc:
    """``(x, y) -> None``."""
    lanes, rows, columns = isa.lanes, shape.rows, shape.columns
    parallel = threads > 1 and x.size >= MIN_PARALLEL_ELEMENTS
    across = -(-columns // lanes)

    def body(source, target) -> None:
        # TVM looks whether what has one input and as large an output is a reshape, and expects a block there.
        with T.sblock("root"), (T.parallel if parallel else T.serial)(0, shape.outer * across) as index:
            outer = T.bind(index // across)
            column = overlapped_start(T.bind(index % across), lanes, columns)
            first = outer * (rows * columns)
            with T.serial(0, -(-rows // lanes)) as tile:
                row = overlapped_start(tile, lanes, rows)
                vectors = [
                    bind(load(source, first + (row + i) * columns + column, lanes)) for i in range(lanes)
                ]
                for i, vector in enumerate(_turned(vectors)):
                    store(target, first + (column + i) * rows + row, vector, lanes)

    return build_prim_func("transpose", [x, y], body)


def _turned(vectors: list) -> list:
    lanes = len(vectors)
    for _ in range(lanes.bit_length() - 1):
        pairs = zip(vectors[: lanes // 2], vectors[lanes // 2 :], strict=True)
        vectors = [half for a, b in pairs for half in (_interleaved(a, b, 0), _interleaved(a, b, lanes // 2))]
    return vectors


def _interleaved(a, b, start: int):
    """``a[start], b[start], a[start + 1], ...``"""
    lanes = lanes_of(a)
    places = [place for i in range(start, start + lanes // 2) for place in (i, lanes + i)]
    return bind(tirx.Shuffle([a, b], [tirx.const(place, "int32") for place in places]))
