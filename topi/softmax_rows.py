"""Softmax over the rows of a matrix of any size, for training: three passes over a row in cache.

The sum has 16 lane accumulators, element i in lane i mod 16, combined in the fixed tree, as in ``softmax``, whose
kernels have static shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.tables.table import Table
from tvm_qfp8.topi.float_contract import LANES, add, bind, mul, sub, tree_sum, with_lanes
from tvm_qfp8.topi.interpolate import emit_table
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.prim_func import load, store


@dataclass(frozen=True)
class SoftmaxRows:
    """One kernel ``main(x, y, length)`` on float32 arrays ``(rows * length,)``."""

    exp: Table
    parallel: bool

    def prim_func(self, isa: InstructionSet) -> tirx.PrimFunc:
        """The kernel for an instruction set; its arrays need no more alignment than an element has."""
        with IRBuilder() as builder:
            with T.prim_func(s_tir=True):
                T.func_name("main")
                T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
                size = tirx.Var("size", "int64")
                # A symbolic offset, 0 when called, keeps LLVM from taking rows for aligned to whole vectors.
                x, y = (
                    T.arg(
                        name,
                        T.buffer(
                            (size,), "float32", elem_offset=tirx.Var(f"at_{name}", "int64"), offset_factor=1
                        ),
                    )
                    for name in ("x", "y")
                )
                length = T.arg("length", tirx.Var("length", "int64"))
                with (T.parallel if self.parallel else T.serial)(0, size // length) as row:
                    self._row(x, y, row * length, length, isa)
        return builder.get()

    def _row(self, x, y, start, length, isa: InstructionSet) -> None:
        lanes = min(isa.lanes, LANES)
        groups, rest = length // LANES, length % LANES
        vector = with_lanes("float32", lanes)
        parts = range(0, LANES, lanes)
        # The part after the last whole group stands here, padded with what does not change the result.
        tail = T.alloc_buffer((LANES,), "float32", align=64)
        kept = T.alloc_buffer((LANES,), "float32", scope="local", align=64)
        for part in parts:
            store(tail, part, tirx.const(float("-inf"), vector), lanes)
            store(kept, part, tirx.const(float("-inf"), vector), lanes)
        with T.serial(0, rest) as i:
            store(tail, i, load(x, start + groups * LANES + i, 1), 1)

        def for_each_vector(body) -> None:
            with T.serial(0, groups) as group:
                for part in parts:
                    body(x, start + group * LANES + part, y, start + group * LANES + part, part)
            for part in parts:
                body(tail, part, tail, part, part)

        def largest(source, at, _target, _to, part) -> None:
            store(kept, part, tirx.max(load(kept, part, lanes), load(source, at, lanes)), lanes)

        for_each_vector(largest)
        values = [T.bind(load(kept, lane, 1)) for lane in range(LANES)]
        while len(values) > 1:
            values = [T.bind(tirx.max(a, b)) for a, b in zip(values[::2], values[1::2], strict=True)]
        peak = bind(tirx.Broadcast(values[0], lanes)) if lanes > 1 else values[0]
        for part in parts:
            store(kept, part, tirx.const(0.0, vector), lanes)

        def exponential(source, at, target, to, part) -> None:
            value = bind(emit_table(self.exp, bind(sub(load(source, at, lanes), peak)), isa))
            store(target, to, value, lanes)
            store(kept, part, add(load(kept, part, lanes), value), lanes)

        for_each_vector(exponential)
        total = tree_sum([T.bind(load(kept, lane, 1)) for lane in range(LANES)])
        factor = T.bind(tirx.const(1.0, "float32") / total)
        wide = bind(tirx.Broadcast(factor, lanes)) if lanes > 1 else factor
        with T.serial(0, groups) as group:
            for part in parts:
                at = start + group * LANES + part
                store(y, at, mul(load(y, at, lanes), wide), lanes)
        with T.serial(0, rest) as i:
            store(y, start + groups * LANES + i, mul(load(tail, i, 1), factor), 1)
