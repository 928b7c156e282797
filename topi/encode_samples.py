"""Encode with a scale for each sample of a batch, found when the data is there: as ``encode_rows`` on whole samples.

Convolutions over windows add up values of many pixels, which therefore share a scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.format import Layout
from tvm_qfp8.topi.cuda.rows import for_each_row as for_each_cuda_row
from tvm_qfp8.topi.encode_rows import coded, emit_scale
from tvm_qfp8.topi.float_contract import LANES, bind
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import overlapped_start, round_up
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, load, load_float, store
from tvm_qfp8.topi.rows import MIN_PARALLEL_ELEMENTS, Row


def encode_samples_prim_func(
    isa: InstructionSet, threads: int, x: TensorSpec, layout: Layout
) -> tirx.PrimFunc:
    """``(x, inverse, codes, scales) -> None`` for ``x (samples, ...)`` and float32 scales ``(samples,)``.

    ``x`` is float32, or kept as float16 or bfloat16.
    ``inverse (1,)`` is fl32(1 / largest G): TVM takes a function of one input for a reshape, and looks for its block.
    """
    samples, length = x.shape[0], math.prod(x.shape[1:])
    codes, scales = TensorSpec(x.shape, "uint8"), TensorSpec(x.shape[:1], "float32")
    parts = threads if length >= MIN_PARALLEL_ELEMENTS else 1
    size = length if parts == 1 else round_up(-(-length // parts), LANES)

    def body(source, inverse, code_buffer, scale_buffer) -> None:
        def cpu_sample(sample) -> None:
            def in_parts(walk: Callable) -> None:
                with (T.parallel if parts > 1 else T.serial)(0, parts) as part:
                    walk(part, bind(sample * length + overlapped_start(part, size, length)))

            largest = T.alloc_buffer((parts,), "float32")

            def find_largest(part, start) -> None:
                row = Row(
                    isa,
                    size,
                    lambda at, lanes: tirx.abs(bind(load_float(source, start + at, lanes))),
                    pad=0.0,
                )
                store(largest, part, row.first_lane(row.largest()), 1)

            def write_codes(_part, start) -> None:
                row = Row(isa, size, lambda at, lanes: bind(load_float(source, start + at, lanes)), pad=0.0)
                reciprocal = load(largest, 0, 1)
                row.finish(
                    coded(bind(reciprocal), layout, isa),
                    lambda code, at, lanes: store(code_buffer, start + at, code, lanes),
                )

            in_parts(find_largest)
            total = load(largest, 0, 1)
            for part in range(1, parts):
                total = tirx.max(total, load(largest, part, 1))
            scale, reciprocal = emit_scale(bind(total), bind(load(inverse, 0, 1)))
            store(scale_buffer, sample, scale, 1)
            store(largest, 0, reciprocal, 1)
            in_parts(write_codes)

        def read(index, offset, lanes: int):
            return bind(load_float(source, index * length + offset, lanes))

        def cuda_sample(row, index) -> None:
            magnitudes = row.mapped(lambda v: tirx.abs(v))
            total = magnitudes.first_lane(magnitudes.largest())
            scale, reciprocal = emit_scale(total, bind(load(inverse, 0, 1)))
            row.finish(
                coded(reciprocal, layout, isa),
                lambda code, at, lanes: store(code_buffer, index * length + at, code, lanes),
            )
            store(scale_buffer, index, scale, 1)

        if isa.name == "cuda":
            for_each_cuda_row(samples, length, read, cuda_sample)
        else:
            with T.serial(0, samples) as sample:
                cpu_sample(sample)

    return build_prim_func("encode_samples", [x, TensorSpec((1,), "float32"), codes, scales], body)
