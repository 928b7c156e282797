"""Dense layers of one or two rows, whose time is the decoding of weights: the magnitudes are multiplied as bytes.

``vpdpbusd`` multiplies unsigned bytes by signed ones. One look-up makes the magnitudes of 64 weights, the unsigned
bytes; their signs go to the activations, the signed bytes: grid values in two parts, ``2**bits * high + low``, each
kept negated, too. So a code costs little more than half of what its decoding to int16 does. The sums are exact, as
those of ``gemm.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.format import Layout, decode_grid
from tvm_qfp8.topi.codec import decode_expr
from tvm_qfp8.topi.codec_lookup import look_up_128
from tvm_qfp8.topi.float_contract import bind, dtype_of, with_lanes
from tvm_qfp8.topi.gemm import MIN_PARALLEL_MACS, GemmShape
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.micro_kernel import RegisterTile, reduce_steps
from tvm_qfp8.topi.overflow import INT32_LIMIT
from tvm_qfp8.topi.panels import fetch_stream, overlapped_start, pack_panels, round_up, zero_run
from tvm_qfp8.topi.prim_func import load, store, vector_runs

MOST_ROWS = 2
"""With more the signs, which each part of each row takes, cost more than the decoding of weights to int16."""

MAGNITUDES = 128
"""Codes without their sign."""


def _low_bits(activation: Layout) -> int:
    """Bits of the low part; 0 where a grid value is a signed byte."""
    return max(0, activation.max_grid.bit_length() - 7)


def _parts(activation: Layout) -> int:
    return 2 if _low_bits(activation) else 1


def multiplies_magnitudes(isa: InstructionSet, shape: GemmShape, codes: np.ndarray) -> bool:
    """Whether this kernel fits: AVX512-VBMI and VNNI, so few rows, magnitudes of a byte, sums that fit int32."""
    machine = isa.name == "avx512" and isa.byte_permute and isa.byte_products is not None
    if not machine or shape.rows > MOST_ROWS:
        return False
    activation, weight = shape.layouts()
    if not weight.signed or weight.max_grid >= 256:
        return False
    sums = np.abs(decode_grid(codes, weight).astype(np.int64)).sum(axis=1)
    return int(sums.max(initial=0)) * (activation.max_grid + (2 << _low_bits(activation))) < INT32_LIMIT


def _vectors(isa: InstructionSet, shape: GemmShape) -> int:
    rows = shape.rows * _parts(shape.layouts()[0])
    return max(1, min(4, -(-shape.columns // isa.lanes), (isa.registers - 6) // (rows + 2)))


def pack_few_rows(isa: InstructionSet, shape: GemmShape, codes: np.ndarray) -> np.ndarray:
    """Codes ``(columns, depth)`` -> panels of columns, fours of depth."""
    panels = pack_panels(codes, _vectors(isa, shape) * isa.lanes, 4)
    return panels.reshape(len(panels), -1)


def emit_few_rows(isa: InstructionSet, shape: GemmShape, x, panels, epilogue: Callable, threads: int) -> None:
    """Emit the loops; ``epilogue(acc, row, column, valid)`` as in ``gemm.py``."""
    assert isa.byte_products is not None
    activation, weight = shape.layouts()
    isa = isa.byte_products
    vectors, parts = _vectors(isa, shape), _parts(activation)
    width, vector_codes = vectors * isa.lanes, isa.lanes * isa.pair
    depth = round_up(shape.depth, isa.pair)
    part_size = shape.rows * depth
    negated = parts * part_size
    scratch = T.alloc_buffer((2 * negated,), "int8", align=64)
    with T.serial(0, shape.rows) as row:
        _decode_row(isa, shape, x, row, scratch, row * depth, part_size)
    starts = [part * part_size + row * depth for part in range(parts) for row in range(shape.rows)]
    valid = [min(isa.lanes, shape.columns - at) for at in range(0, min(width, shape.columns), isa.lanes)]
    parallel = threads > 1 and shape.rows * shape.columns * shape.depth >= MIN_PARALLEL_MACS
    table = decode_grid(np.arange(MAGNITUDES, dtype=np.uint8), weight)

    with (T.parallel if parallel else T.serial)(0, -(-shape.columns // width)) as panel:
        registers = RegisterTile(isa, parts * shape.rows, vectors)
        start = T.bind(panel * (depth * width))

        def one_step(step) -> None:
            # Stage by stage: vector after vector, instructions of one port would wait for each other.
            at = T.bind(start + step * (width * isa.pair))
            fetch_stream(isa, panels, at, width * isa.pair, shape.columns * depth)
            codes = [T.bind(load(panels, at + v * vector_codes, vector_codes)) for v in range(vectors)]
            magnitudes = [look_up_128(vector, table) for vector in codes]
            for row, start_of_row in enumerate(starts):
                place = start_of_row + step * isa.pair
                plus, minus = (T.bind(isa.broadcast(scratch, place + sign)) for sign in (0, negated))
                signed = [bind(tirx.Select(_is_negative(vector), minus, plus)) for vector in codes]
                for vector in range(vectors):
                    registers.accumulate_vector(row, magnitudes[vector], signed[vector], vector)

        reduce_steps(depth // isa.pair, 1, one_step)
        first_column = overlapped_start(panel, width, shape.columns)
        for row in range(shape.rows):
            for vector, real in enumerate(valid):
                total = registers.value(row, vector)
                if parts == 2:
                    high = total << tirx.const(_low_bits(activation), dtype_of(total))
                    total = high + registers.value(shape.rows + row, vector)
                epilogue(bind(total), row, first_column + vector * isa.lanes, real)


def _is_negative(codes):
    return codes >= tirx.const(MAGNITUDES, dtype_of(codes))


def _decode_row(isa: InstructionSet, shape: GemmShape, x, row, scratch, target, part_size: int) -> None:
    activation, _ = shape.layouts()
    bits, parts = _low_bits(activation), _parts(activation)
    depth = round_up(shape.depth, isa.pair)

    def emit(offset, lanes: int) -> None:
        codes = load(x, row * shape.depth + offset, lanes)
        grid = bind(decode_expr(codes, activation, "int16"))
        dtype, byte = with_lanes("int16", lanes), with_lanes("int8", lanes)
        high, low = grid >> tirx.const(bits, dtype), grid & tirx.const((1 << bits) - 1, dtype)
        for part, wide in enumerate((high, low)[:parts]):
            value, at = bind(wide.astype(byte)), target + offset + part * part_size
            store(scratch, at, value, lanes)
            store(scratch, at + parts * part_size, tirx.const(0, byte) - value, lanes)

    vector_runs(shape.depth, 2 * isa.lanes, emit)
    for part in range(2 * parts):
        zero_run(isa, scratch, target + part * part_size + shape.depth, depth - shape.depth)
