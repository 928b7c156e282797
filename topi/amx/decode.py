"""Codes to the operands of tiles: bytes as they are multiplied, or bfloat16, which holds every grid value exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tvm import tirx

from tvm_qfp8.format import Layout, decode_grid
from tvm_qfp8.topi.amx.plan import part as part_of
from tvm_qfp8.topi.amx.tiles import BFLOAT16, TileKind
from tvm_qfp8.topi.codec_lookup import look_up_128
from tvm_qfp8.topi.codec_parts import decode_parts
from tvm_qfp8.topi.float_contract import bind, lanes_of, with_lanes
from tvm_qfp8.topi.prim_func import load, store, vector_runs
from tvm_qfp8.topi.split import WHOLE, Split

CODES = 64
"""Codes that are looked up at once."""

AS_BYTES = Split(0, (WHOLE,), (WHOLE,), (1,))

PACKED = np.concatenate([np.r_[at : at + 8, at + 32 : at + 40] for at in range(0, 32, 8)])
"""Which of 64 numbers has which place among packed codes: so the instructions that put a low and a high byte beside
each other, which work on 16 bytes for themselves, give the numbers in order."""

PLACES = np.argsort(PACKED).tolist()
"""The place of each number."""


def decode_for_tiles(
    kind: TileKind,
    layout: Layout,
    source,
    source_at,
    target,
    target_at,
    length: int,
    part: tuple[int, bool] | None = None,
    packed: bool = False,
) -> None:
    """Make operands of ``length`` neighbouring codes; of a ``part`` of them, (shift, high), as in ``plan.part``.

    ``packed``: groups of 64 are in the order ``PACKED``, and ``length`` is whole groups.
    """

    def emit(offset, lanes: int) -> None:
        codes = load(source, source_at + offset, lanes)
        for at, value in operands_of(kind, layout, codes, part, packed):
            store(target, target_at + offset + at, value, lanes_of(value))

    vector_runs(length, CODES, emit)


def operands_of(
    kind: TileKind, layout: Layout, codes, part: tuple[int, bool] | None = None, packed: bool = False
) -> list[tuple]:
    """[(offset, vector)] of the operands of a vector of codes."""
    lanes = lanes_of(codes)
    if kind is not BFLOAT16 and part is None:
        if not layout.signed:
            return [(0, bind(tirx.reinterpret(with_lanes("int8", lanes), codes)))]
        return [(0, decode_parts(codes, layout, AS_BYTES, (WHOLE,))[0])]
    if lanes < CODES:
        codes = bind(tirx.Shuffle([codes] * (CODES // lanes), [tirx.const(i, "int32") for i in range(CODES)]))
    if kind is not BFLOAT16 and part is not None:
        values = _bytes_of_part(codes, layout, part)
        first = [tirx.const(i, "int32") for i in range(lanes)]
        return [(0, values if lanes == CODES else bind(tirx.Shuffle([values], first)))]
    low, high = _looked_up(codes, layout, part)
    if packed:
        return [(at, _interleaved(low, high, PLACES[at : at + 32])) for at in (0, 32)]
    return [(at, _interleaved(low, high, range(at, at + min(lanes, 32)))) for at in range(0, lanes, 32)]


def _bytes_of_part(codes, layout: Layout, part: tuple[int, bool]):
    """int8 of 64 codes."""
    top = tirx.const(0x80, "uint8x64")
    table = part_of(_magnitudes(layout), *part).astype(np.int8).view(np.uint8)
    found = [look_up_128(codes, half) for half in table.reshape(-1, 128)]
    other = bind(tirx.const(0, "uint8x64") - found[0]) if layout.signed else found[1]
    return bind(tirx.reinterpret("int8x64", tirx.Select(codes >= top, other, found[0])))


def _looked_up(codes, layout: Layout, part: tuple[int, bool] | None) -> tuple:
    """(low, high) bytes of 64 numbers."""
    top = tirx.const(0x80, "uint8x64")
    tables = _bytes(layout, part)
    low, high = ([look_up_128(codes, half) for half in table.reshape(-1, 128)] for table in tables)
    if layout.signed:
        return low[0], bind(high[0] ^ (codes & top))
    return tuple(bind(tirx.Select(codes >= top, second, first)) for first, second in (low, high))


def _bytes(layout: Layout, part: tuple[int, bool] | None) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) bytes of what codes stand for, without their sign."""
    grid = _magnitudes(layout)
    values = (part_of(grid, *part) if part else grid).astype(np.float32)
    halves = values.view(np.uint32) >> 16
    return (halves & 0xFF).astype(np.uint8), (halves >> 8).astype(np.uint8)


def _magnitudes(layout: Layout) -> np.ndarray:
    """Grid values of all codes without a sign."""
    return decode_grid(np.arange(128 if layout.signed else 256, dtype=np.uint8), layout)


def _interleaved(low, high, places: Sequence[int]):
    """Numbers of two bytes, from the bytes at ``places``."""
    order = [half * CODES + place for place in places for half in (0, 1)]
    found = bind(tirx.Shuffle([low, high], [tirx.const(place, "int32") for place in order]))
    return bind(tirx.reinterpret(with_lanes("uint16", len(places)), found))
