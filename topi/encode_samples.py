"""Encode with a scale for each sample of a batch, found when the data is there: as ``encode_rows`` on whole samples.

Convolutions over windows add up values of many pixels, which therefore share a scale.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.format import Layout
from tvm_qfp8.topi.cuda.rows import for_each_row
from tvm_qfp8.topi.encode_rows import coded, emit_scale
from tvm_qfp8.topi.float_contract import LANES, bind
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import overlapped_start, round_up
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, load, load_float, store
from tvm_qfp8.topi.rows import MIN_PARALLEL_ELEMENTS, Row


def encode_samples_prim_func(
    isa: InstructionSet, threads: int, parts: Sequence[TensorSpec], layout: Layout
) -> tirx.PrimFunc:
    """``(parts ..., inverse, codes, scales) -> None`` for what is ``(samples, ..., channels)`` when it is joined.

    ``parts``, joined along the last axis, are float32, or kept as float16 or bfloat16; scales are float32
    ``(samples,)``. ``inverse (1,)`` is fl32(1 / largest G): TVM takes a function of one input for a reshape, and looks
    for its block.
    """
    shape = (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))
    codes, scales = TensorSpec(shape, "uint8"), TensorSpec(shape[:1], "float32")
    if isa.name == "cuda":
        (part,) = parts
        body = functools.partial(_on_gpu, isa, part, layout)
    else:
        body = functools.partial(_on_cpu, isa, threads, parts, layout)
    return build_prim_func("encode_samples", [*parts, TensorSpec((1,), "float32"), codes, scales], body)


def _on_cpu(isa: InstructionSet, threads: int, parts: Sequence[TensorSpec], layout: Layout, *buffers) -> None:
    *sources, inverse, code_buffer, scale_buffer = buffers
    # A part that is alone is one run.
    pixels = 1 if len(parts) == 1 else math.prod(parts[0].shape[1:-1])
    lengths = [math.prod(part.shape[1:]) // max(1, pixels) for part in parts]
    shares = threads if pixels * sum(lengths) >= MIN_PARALLEL_ELEMENTS else 1

    def in_shares(length: int, walk: Callable) -> None:
        """``walk(start, size, share)`` over ``length`` of something; shares may overlap."""
        size = length if shares == 1 else min(length, round_up(-(-length // shares), LANES))
        with (T.parallel if shares > 1 else T.serial)(0, shares) as share:
            walk(bind(overlapped_start(share, size, length)), size, share)

    def row_of(source, start, size: int, function: Callable = lambda value: value) -> Row:
        return Row(
            isa, size, lambda at, lanes: bind(function(bind(load_float(source, start + at, lanes)))), pad=0.0
        )

    def one_sample(sample) -> None:
        largest = T.alloc_buffer((len(parts) * shares,), "float32")
        for index, (source, length) in enumerate(zip(sources, lengths, strict=True)):

            def find_largest(start, size: int, share, index=index, source=source, length=length) -> None:
                row = row_of(source, sample * (pixels * length) + start, size, tirx.abs)
                store(largest, index * shares + share, row.first_lane(row.largest()), 1)

            in_shares(pixels * length, find_largest)
        total = load(largest, 0, 1)
        for share in range(1, len(parts) * shares):
            total = tirx.max(total, load(largest, share, 1))
        scale, reciprocal = emit_scale(bind(total), bind(load(inverse, 0, 1)))
        store(scale_buffer, sample, scale, 1)
        store(largest, 0, reciprocal, 1)

        def write_run(source, source_at, target_at, size: int) -> None:
            row_of(source, source_at, size).finish(
                coded(bind(load(largest, 0, 1)), layout, isa),
                lambda code, at, lanes: store(code_buffer, target_at + at, code, lanes),
            )

        if len(parts) == 1:

            def write_codes(start, size: int, _share) -> None:
                at = bind(sample * lengths[0] + start)
                write_run(sources[0], at, at, size)

            in_shares(lengths[0], write_codes)
            return

        def write_pixels(start, size: int, _share) -> None:
            with T.serial(0, size) as index:
                pixel = bind(sample * pixels + start + index)
                first = 0
                for source, length in zip(sources, lengths, strict=True):
                    write_run(source, pixel * length, pixel * sum(lengths) + first, length)
                    first += length

        in_shares(pixels, write_pixels)

    with T.serial(0, parts[0].shape[0]) as sample:
        one_sample(sample)


def _on_gpu(
    isa: InstructionSet, part: TensorSpec, layout: Layout, source, inverse, code_buffer, scale_buffer
) -> None:
    samples, length = part.shape[0], math.prod(part.shape[1:])

    def read(index, offset, lanes: int):
        return bind(load_float(source, index * length + offset, lanes))

    def one_sample(row, index) -> None:
        magnitudes = row.mapped(lambda v: tirx.abs(v))
        total = magnitudes.first_lane(magnitudes.largest())
        scale, reciprocal = emit_scale(total, bind(load(inverse, 0, 1)))
        row.finish(
            coded(reciprocal, layout, isa),
            lambda code, at, lanes: store(code_buffer, index * length + at, code, lanes),
        )
        store(scale_buffer, index, scale, 1)

    for_each_row(samples, length, read, one_sample)
