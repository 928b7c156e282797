"""A table over a whole array of any length, and a table of a derivative times a gradient: the kernels of training.

Arrays are float32 or bfloat16, the latter as the words that hold it; the arithmetic is float32 and rounds once
to bfloat16. A last part shorter than a vector goes through a buffer of one vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.tables.table import Table
from tvm_qfp8.topi.float_contract import BFLOAT16_WORDS, as_bfloat16, bind, mul, round_to_bfloat16, with_lanes
from tvm_qfp8.topi.interpolate import emit_table
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.prim_func import load, load_float, store

CHUNK_VECTORS = 1024
"""Vectors that one thread takes at a time."""


@dataclass(frozen=True)
class ApplyTable:
    """One kernel ``main(input, ..., output)`` on 1-D arrays of one length.

    With ``gradient`` the inputs are ``(grad, x)`` and the output is ``grad * table(x)``, else ``(x,)`` and
    ``table(x)``.
    """

    table: Table
    gradient: bool
    storage: str
    """``float32``, or ``BFLOAT16_WORDS``."""
    parallel: bool

    def prim_func(self, isa: InstructionSet) -> tirx.PrimFunc:
        """The kernel for an instruction set; its arrays need no more alignment than an element has."""
        count = 3 if self.gradient else 2
        with IRBuilder() as builder:
            with T.prim_func(s_tir=True):
                T.func_name("main")
                T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
                length = tirx.Var("n", "int64")
                # A symbolic offset, 0 when called, keeps LLVM from taking the arrays for aligned to whole vectors.
                arrays = [
                    T.arg(
                        f"p{i}",
                        T.buffer(
                            (length,), self.storage, elem_offset=tirx.Var(f"o{i}", "int64"), offset_factor=1
                        ),
                    )
                    for i in range(count)
                ]
                self._emit(arrays, length, isa)
        return builder.get()

    def _emit(self, arrays: Sequence, length, isa: InstructionSet) -> None:
        lanes = isa.lanes
        vectors = length // lanes
        if self.parallel:
            with T.parallel(0, (vectors + CHUNK_VECTORS - 1) // CHUNK_VECTORS) as chunk:
                start = chunk * CHUNK_VECTORS
                with T.serial(0, tirx.min(vectors - start, CHUNK_VECTORS)) as i:
                    self._vector(arrays, (start + i) * lanes, isa)
        else:
            with T.serial(0, vectors) as i:
                self._vector(arrays, i * lanes, isa)
        rest = [T.alloc_buffer((lanes,), self.storage, align=64) for _ in arrays]
        for buffer, array in zip(rest[:-1], arrays[:-1], strict=True):
            store(buffer, 0, tirx.const(0, with_lanes(self.storage, lanes)), lanes)
            with T.serial(0, length % lanes) as i:
                store(buffer, i, load(array, vectors * lanes + i, 1), 1)
        self._vector(rest, 0, isa)
        with T.serial(0, length % lanes) as i:
            store(arrays[-1], vectors * lanes + i, load(rest[-1], i, 1), 1)

    def _vector(self, arrays: Sequence, at, isa: InstructionSet) -> None:
        *inputs, output = arrays
        values = [bind(load_float(array, at, isa.lanes)) for array in inputs]
        result = emit_table(self.table, values[-1], isa)
        if self.gradient:
            result = bind(mul(values[0], result))
        if self.storage == BFLOAT16_WORDS:
            result = as_bfloat16(round_to_bfloat16(result))
        store(output, at, result, isa.lanes)
