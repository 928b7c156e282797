"""Codes to the operands of tiles: bytes as they are multiplied, or bfloat16, which holds every grid value exactly."""

from __future__ import annotations

import numpy as np
from tvm import tirx

from tvm_qfp8.format import Layout, decode_grid
from tvm_qfp8.topi.amx.tiles import BFLOAT16, TileKind
from tvm_qfp8.topi.codec import decode_expr
from tvm_qfp8.topi.codec_lookup import look_up_128
from tvm_qfp8.topi.codec_parts import decode_parts
from tvm_qfp8.topi.float_contract import bind, lanes_of, to_float, with_lanes
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.prim_func import load, store, vector_runs
from tvm_qfp8.topi.split import WHOLE, Split

AS_BYTES = Split(0, (WHOLE,), (WHOLE,), (1,))


def decode_for_tiles(
    isa: InstructionSet, kind: TileKind, layout: Layout, source, source_at, target, target_at, length: int
) -> None:
    """Make operands of ``length`` neighbouring codes."""

    def emit(offset, lanes: int) -> None:
        codes = load(source, source_at + offset, lanes)
        for at, value in operands_of(isa, kind, layout, codes):
            store(target, target_at + offset + at, value, lanes_of(value))

    vector_runs(length, 64, emit)


def operands_of(isa: InstructionSet, kind: TileKind, layout: Layout, codes) -> list[tuple]:
    """[(offset, vector)] of the operands of a vector of codes."""
    lanes = lanes_of(codes)
    if kind is not BFLOAT16:
        if not layout.signed:
            return [(0, bind(tirx.reinterpret(with_lanes("int8", lanes), codes)))]
        return [(0, decode_parts(codes, layout, AS_BYTES, (WHOLE,))[0])]
    if lanes == 64:
        return [(at, _interleaved(*_looked_up(codes, layout), at)) for at in (0, 32)]
    if lanes == 32:
        twice = bind(tirx.Shuffle([codes, codes], [tirx.const(i, "int32") for i in range(64)]))
        return [(0, _interleaved(*_looked_up(twice, layout), 0))]
    return [(0, _from_grid(codes, layout, isa))]


def _looked_up(codes, layout: Layout) -> tuple:
    """(low, high) bytes of 64 numbers."""
    top = tirx.const(0x80, "uint8x64")
    low, high = ([look_up_128(codes, half) for half in table.reshape(-1, 128)] for table in _bytes(layout))
    if layout.signed:
        return low[0], bind(high[0] | (codes & top))
    return tuple(bind(tirx.Select(codes >= top, second, first)) for first, second in (low, high))


def _bytes(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) bytes of the grid values of codes, without sign."""
    values = decode_grid(np.arange(128 if layout.signed else 256, dtype=np.uint8), layout).astype(np.float32)
    halves = values.view(np.uint32) >> 16
    return (halves & 0xFF).astype(np.uint8), (halves >> 8).astype(np.uint8)


def _interleaved(low, high, first: int):
    """32 numbers of two bytes from the bytes ``first`` and on."""
    order = [half * 64 + first + i for i in range(32) for half in (0, 1)]
    found = tirx.Shuffle([low, high], [tirx.const(place, "int32") for place in order])
    return bind(tirx.reinterpret("uint16x32", bind(found)))


def _from_grid(codes, layout: Layout, isa: InstructionSet):
    """The upper halves of float32 numbers; what is cut off is zero."""
    lanes = lanes_of(codes)
    grid = bind(decode_expr(codes, layout, "int16", isa).astype(with_lanes("int32", lanes)))
    bits = bind(tirx.reinterpret(with_lanes("uint32", lanes), bind(to_float(grid))))
    return bind((bits >> tirx.const(16, with_lanes("uint32", lanes))).astype(with_lanes("uint16", lanes)))
