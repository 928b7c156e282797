"""Weight panels and the decoding of codes into scratch.

A weight matrix of ``columns`` output channels and ``depth`` reduction steps is stored, as codes, in panels of
``width`` columns: ``(panels, depth / pair, width, pair)``. That is the order in which the micro-kernel reads it,
and decoding keeps the order, so a panel is decoded into cache by one straight run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.format import Layout, decode_grid
from tvm_qfp8.topi.codec import decode_expr
from tvm_qfp8.topi.codec_parts import decode_parts
from tvm_qfp8.topi.float_contract import bind, to_float, with_lanes
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.prim_func import CACHE_LINE, load, load_float, prefetch_run, store, vector_runs


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def balanced_blocks(extent: int, most: int, multiple: int = 1) -> tuple[int, int]:
    """(size, count) of equal blocks that cover ``extent``, each at most about ``most``: little overlap at the end."""
    size = min(extent, round_up(-(-extent // -(-extent // max(1, most))), multiple))
    return size, -(-extent // size)


def overlapped_start(index, step: int, extent: int):
    """Start of tile ``index`` of ``step`` elements: the last tile overlaps the one before it.

    So every tile is a whole one and its code stands once; what is written twice gets the same bits. (A second copy
    of a micro-kernel for the remainder makes LLVM's code for both half as fast.)
    """
    if extent <= step:
        return 0
    if extent % step == 0:
        return index * step
    return T.bind(tirx.min(index * step, extent - step))


def pack_panels(codes: np.ndarray, width: int, pair: int) -> np.ndarray:
    """Codes ``(columns, depth)`` -> panels ``(panels, depth / pair, width, pair)``.

    The last panel overlaps the one before it; a lone narrower one is padded with code 0.
    """
    columns, depth = codes.shape
    padded = np.zeros((max(columns, width), round_up(depth, pair)), codes.dtype)
    padded[:columns, :depth] = codes
    starts = [min(start, len(padded) - width) for start in range(0, len(padded), width)]
    panels = np.stack([padded[start : start + width] for start in starts])
    return np.ascontiguousarray(panels.reshape(len(starts), width, -1, pair).transpose(0, 2, 1, 3))


def pack_weights(isa: InstructionSet, layout: Layout | None, codes: np.ndarray, vectors: int) -> np.ndarray:
    """Codes ``(columns, depth)`` -> what a kernel reads, uint8 ``(panels, panel_size)``; without layout all float32.

    Codes in panels, or where the instruction set multiplies linear bytes (``Split.weights_ready``) these themselves;
    after them, if activations have an offset, what each column's sum is off by, negated: an int32 of four bytes.
    """
    width = vectors * isa.lanes
    if layout is None or isa.split is None or not isa.weights_in_place:
        panels = pack_panels(codes, width, isa.pair)
        return panels.reshape(len(panels), -1)
    panels = pack_panels(decode_grid(codes, layout).astype(np.int8), width, isa.pair)
    sums = panels.sum(axis=(1, 3), dtype=np.int32) * np.int32(-isa.split.offset)
    if isa.halved_pairs:
        halves = panels.reshape(*panels.shape[:2], vectors, isa.lanes, 2, isa.pair // 2)
        panels = np.ascontiguousarray(halves.swapaxes(3, 4))
    packed = panels.reshape(len(panels), -1).view(np.uint8)
    if not isa.split.offset:
        return packed
    return np.concatenate([packed, sums.astype("<i4").view(np.uint8)], axis=1)


def panel_size(isa: InstructionSet, depth: int, vectors: int) -> int:
    """Elements of one panel of ``pack_weights``."""
    width = vectors * isa.lanes
    return depth * width + (4 * width if isa.split and isa.split.offset else 0)


STREAM_BYTES, STREAM_AHEAD = 1 << 20, 8192
"""From so many bytes on, weights that are read only once are asked for so many bytes ahead, unless the processor looks
ahead far enough itself."""


def fetch_stream(isa: InstructionSet, panels, at, length: int, weights: int) -> None:
    """Where ``length`` codes from ``at`` are read, of so many that are read once, ask for those that come later."""
    if isa.asks_ahead and weights > STREAM_BYTES:
        prefetch_run(panels, at + STREAM_AHEAD, length)


CHANNEL_PADDING = 16
"""Elements that a vector load may reach past the last channel."""


def pad_channels(values: np.ndarray) -> np.ndarray:
    """Per-channel float32 values, padded with zeros so that a vector may start at any channel."""
    padded = np.zeros(len(values) + CHANNEL_PADDING, np.float32)
    padded[: len(values)] = values
    return padded


def operand_expr(isa: InstructionSet, layout: Layout | None, values):
    """What is multiplied: the grid values of codes as ``isa.operand``, or float32 ``values``, which have no layout."""
    if layout is None:
        return values
    grid = decode_expr(values, layout, "int16", isa)
    return to_float(bind(grid)) if isa.operand == "float32" else grid


def decode_run(
    isa: InstructionSet, layout: Layout | None, source, source_at, target, target_at, length: int
) -> None:
    """Make operands of ``length`` neighbouring codes or float values."""

    def emit(offset, lanes):
        values = bind(load_float(source, source_at + offset, lanes))
        store(target, target_at + offset, operand_expr(isa, layout, values), lanes)

    vector_runs(length, 2 * isa.lanes, emit)


def decode_operand(
    isa: InstructionSet,
    layout: Layout | None,
    parts: Sequence[str] | None,
    source,
    source_at,
    target,
    target_at,
    length: int,
    part_size: int,
) -> None:
    """Decode ``length`` neighbouring codes into what the instruction set multiplies.

    That is int16 or float32, or the int8 ``parts`` of its split, each ``part_size`` elements behind the one before it.
    """
    if layout is None or isa.split is None or parts is None:
        decode_run(isa, layout, source, source_at, target, target_at, length)
        return
    split = isa.split

    def emit(offset, lanes):
        codes = load(source, source_at + offset, lanes)
        for index, part in enumerate(decode_parts(codes, layout, split, parts)):
            store(target, target_at + index * part_size + offset, part, lanes)

    vector_runs(length, 4 * isa.lanes, emit)


def copy_run(isa: InstructionSet, source, source_at, target, target_at, length: int) -> None:
    """Copy ``length`` neighbouring bytes."""

    def emit(offset, lanes):
        store(target, target_at + offset, load(source, source_at + offset, lanes), lanes)

    vector_runs(length, 4 * isa.lanes, emit)


def zero_run(isa: InstructionSet, target, target_at, length: int) -> None:
    """Write ``length`` zeros."""

    def emit(offset, lanes):
        store(target, target_at + offset, tirx.const(0, with_lanes(str(target.dtype), lanes)), lanes)

    if length:
        vector_runs(length, 2 * isa.lanes, emit)


@dataclass(frozen=True)
class PanelShape:
    """``columns`` output channels by ``depth`` (a multiple of ``pair``), ``vectors`` int32 vectors a panel."""

    columns: int
    depth: int
    vectors: int
    weight: Layout | None


@dataclass(frozen=True)
class PanelWeights:
    """The weights of one panel as a micro-kernel sees them."""

    load: Callable
    """(step, vector, product) -> vector of ``lanes * pair`` operands, or of the parts in that product."""
    column: Callable
    """(vector) -> index of its first output channel."""
    prefetch_next: Callable
    """(part, parts) -> None: ask the cache for that part of the next panel's codes, while this one is computed."""
    valid: list[int]
    """Real output channels in each vector; fewer than the lanes only where there are fewer than a panel's."""
    without_offset: Callable = lambda total, vector: total
    """(int32 dot products, vector) -> the same without what the activations' offset added."""


def for_each_panel(
    isa: InstructionSet,
    shape: PanelShape,
    panels,
    body: Callable,
    *,
    loop=T.serial,
    in_registers: bool = False,
) -> None:
    """Emit ``body(PanelWeights)`` for all panels.

    A panel is decoded into cache first, or vector by vector in registers where too few rows reuse it; bytes that are
    multiplied as they are stay where they are.
    """
    lanes, width = isa.lanes, shape.vectors * isa.lanes
    vector_codes = lanes * isa.pair

    valid = [min(lanes, shape.columns - at) for at in range(0, min(width, shape.columns), lanes)]

    size = panel_size(isa, shape.depth, shape.vectors)

    def without_offset_at(start):
        def without_offset(total, vector):
            at = start + shape.depth * width + vector * (4 * lanes)
            error = tirx.reinterpret(with_lanes("int32", lanes), load(panels, at, 4 * lanes))
            return T.bind(total + error)

        return without_offset

    def fetch_ahead(at, vector: int) -> None:
        """What one pass over the weights reads later, once for each cache line; with vectors about as long as one."""
        long = 2 * vector_codes >= CACHE_LINE
        if in_registers and long and (vector * vector_codes) % CACHE_LINE == 0:
            fetch_stream(isa, panels, at, min(CACHE_LINE, vector_codes), shape.columns * shape.depth)

    def one_panel(panel) -> None:
        start = panel * size
        first_column = overlapped_start(panel, width, shape.columns)
        if isa.weights_in_place:

            def load_weights(step, vector, product=0):
                at = T.bind(start + step * (width * isa.pair) + vector * vector_codes)
                fetch_ahead(at, vector)
                stored = load(panels, at, vector_codes)
                return T.bind(tirx.reinterpret(with_lanes("int8", vector_codes), stored))
        elif in_registers or shape.weight is None:

            def load_weights(step, vector, product=0):
                at = T.bind(start + step * (width * isa.pair) + vector * vector_codes)
                fetch_ahead(at, vector)
                codes = load(panels, at, vector_codes)
                return T.bind(operand_expr(isa, shape.weight, codes))
        else:
            decoded = T.alloc_buffer((isa.products * size,), isa.operand_dtype, align=64)
            parts = isa.split.weight if isa.split else None
            decode_operand(isa, shape.weight, parts, panels, start, decoded, 0, size, size)

            def load_weights(step, vector, product=0):
                at = product * size + step * (width * isa.pair) + vector * vector_codes
                return T.bind(load(decoded, at, vector_codes))

        def prefetch_next(part, parts: int) -> None:
            # Decoding reads a panel at once; bytes that are multiplied in place are a stream.
            if isa.asks_ahead or not isa.weights_in_place:
                length = -(-size // parts)
                prefetch_run(panels, start + size + part * length, length)

        def column(vector):
            return first_column + vector * lanes

        found = PanelWeights(load_weights, column, prefetch_next, valid)
        if isa.split is not None and isa.split.offset:
            found = replace(found, without_offset=without_offset_at(start))
        body(found)

    with loop(0, -(-shape.columns // width)) as panel:
        one_panel(panel)
