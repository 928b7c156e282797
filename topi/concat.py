"""Concatenation as copies of whole runs, whatever the data type (TVM's own kernel asks at every element)."""

from __future__ import annotations

import math

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, load, store, vector_runs


def concat_prim_func(isa: InstructionSet, parts: list[TensorSpec], axis: int) -> tirx.PrimFunc:
    """``(parts ..., result) -> None``: parts of equal dtype joined along ``axis``."""
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    lengths = [math.prod(part.shape[axis:]) for part in parts]
    total = sum(lengths)
    item_bits = tirx.const(0, parts[0].dtype).ty.dtype.bits
    lanes = isa.lanes * 32 // max(8, item_bits)

    def body(*buffers) -> None:
        *sources, target = buffers
        with T.serial(0, math.prod(shape[:axis])) as row:
            start = 0
            for source, length in zip(sources, lengths, strict=True):

                def copy(offset, count, source=source, length=length, start=start) -> None:
                    store(
                        target,
                        row * total + start + offset,
                        load(source, row * length + offset, count),
                        count,
                    )

                vector_runs(length, lanes, copy)
                start += length

    return build_prim_func("concat", [*parts, TensorSpec(tuple(shape), parts[0].dtype)], body)
