"""The members of a group after its anchor, emitted as vector code on the anchor's results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax, tirx
from tvm.ir import GenericConst
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.format import Layout, get_layout
from tvm_qfp8.relay_passes.fuse import Group, op_name, shape_of, tensor_arguments
from tvm_qfp8.relay_passes.operands import Operands, array_of, layout_of
from tvm_qfp8.tables import build_table
from tvm_qfp8.topi.codec import ROUNDS_TO_ZERO, decode_expr, encode_expr
from tvm_qfp8.topi.elementwise import emit_elementwise
from tvm_qfp8.topi.float_contract import (
    BFLOAT16_WORDS,
    as_bfloat16,
    as_float16,
    bind,
    dtype_of,
    mul,
    round_to_bfloat16,
    round_to_float16,
    with_lanes,
)
from tvm_qfp8.topi.interpolate import emit_table
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import pad_channels
from tvm_qfp8.topi.prim_func import keep, load, load_float, store, vector_runs


@dataclass(frozen=True)
class External:
    """How an operand of the epilogue is read: an argument with a shape aligned to the output's, or a scalar."""

    argument: int | None
    scalar: int | None
    shape: tuple[int, ...]
    padded: bool = False
    """A vector may be read past the end."""
    layout: Layout | None = None
    """Of an argument that holds codes; their scale is the scalar."""


def clip_bounds(call: relax.Call) -> tuple[float, float] | None:
    """(least, greatest) result of a ReLU or clip, None for any other operator."""
    if op_name(call) == "relax.nn.relu":
        return 0.0, float("inf")
    if op_name(call) == "relax.clip":
        return float(call.args[1].value), float(call.args[2].value)
    return None


class Epilogue:
    """The members after the anchor, as vector code."""

    def __init__(self, group: Group, isa: InstructionSet, operands: Operands, skip: int) -> None:
        self.group, self.isa = group, isa
        self.shape = shape_of(group.members[0][0])
        self.columns = self.shape[-1] if self.shape else 1
        self.members = group.members[skip:]
        inner = {var for var, _ in group.members}
        self.externals: dict[relax.Expr, External] = {}
        self.encode_scalars: dict[relax.Var, int] = {}
        for var, call in self.members:
            for argument in tensor_arguments(call):
                if argument not in inner and argument not in self.externals:
                    self.externals[argument] = self._external(argument, operands)
            if op_name(call) == "relax.qfp8.encode":
                reciprocal = np.float32(1.0) / np.float32(float(call.attrs["scale"]))
                self.encode_scalars[var] = operands.scalar(float(reciprocal))
        self._absorb_clips(operands)
        self.buffers: list = []
        self.outputs: dict = {}
        self.scratch_rows: dict = {}
        """Buffers of a few rows, of members whose rows are read again right after they are finished."""
        self.first_scratch_row: Any = 0
        self.scalar_buffer = None

    def _absorb_clips(self, operands: Operands) -> None:
        """Let an unsigned encode do the work of the ReLU or clip from zero before it, where only it reads that.

        Encoding clamps to [0, greatest grid value] anyway; multiplication by a positive number and rounding keep the
        order, so clamping to ``fl32(upper * r)`` after the multiplication gives the same bits as to ``upper`` before.
        """
        self.limits: dict[relax.Var, int] = {}
        self.absorbed: set[relax.Var] = set()
        made_by = dict(self.members)
        readers = [a for _, call in self.members for a in tensor_arguments(call)]
        for var, call in self.members:
            if op_name(call) != "relax.qfp8.encode":
                continue
            layout, clip = get_layout(str(call.attrs["layout"])), call.args[0]
            if layout.signed or clip not in made_by or clip in self.group.outputs:
                continue
            bounds = clip_bounds(made_by[clip])
            if bounds is None or bounds[0] != 0.0 or readers.count(clip) > 1:
                continue
            if len(call.args) > 1 and np.isfinite(bounds[1]):
                continue  # the limit would be another in each channel
            self.absorbed.add(clip)
            if np.isfinite(bounds[1]):
                upper = np.float32(bounds[1]) * np.float32(operands.scalars[self.encode_scalars[var]])
                limit = float(np.clip(upper, np.float32(ROUNDS_TO_ZERO), np.float32(layout.max_grid)))
                self.limits[var] = operands.scalar(limit)

    def _external(self, expr: relax.Expr, operands: Operands) -> External:
        shape = shape_of(expr)
        aligned = (1,) * (len(self.shape) - len(shape)) + shape
        if op_name(expr) == "relax.qfp8.decode":
            (codes,), scale = expr.args, operands.scalar(float(expr.attrs["scale"]))
            return External(operands.tensor(codes), scale, aligned, layout=layout_of(codes))
        if isinstance(expr, GenericConst):
            array = np.asarray(array_of(expr), np.float32)
            if array.size == 1:
                return External(None, operands.scalar(float(array.reshape(-1)[0])), aligned)
            if array.size == aligned[-1]:
                return External(
                    operands.constant(pad_channels(array.reshape(-1))), None, aligned, padded=True
                )
        return External(operands.tensor(expr), None, aligned)

    def _index(self, shape: tuple[int, ...], row, column):
        """Flat index of the element of a broadcast operand that belongs to (row, column) of the output."""
        if shape == self.shape:
            return row * self.columns + column
        index = column if shape[-1] != 1 else None
        stride, inner = (shape[-1] if shape[-1] != 1 else 1), 1
        for extent, own in zip(reversed(self.shape[:-1]), reversed(shape[:-1]), strict=True):
            if own != 1:
                coordinate = (
                    tirx.floormod(tirx.floordiv(row, inner), extent)
                    if inner != 1
                    else tirx.floormod(row, extent)
                )
                term = coordinate * stride
                index = term if index is None else index + term
                stride *= own
            inner *= extent
        return 0 if index is None else index

    def _scalar(self, index: int, lanes: int):
        value = load(self.scalar_buffer, index, 1)
        return value if lanes == 1 else tirx.Broadcast(value, lanes)

    def _read(self, external: External, row, column, lanes: int, valid: int):
        if external.argument is None:
            assert external.scalar is not None
            return self._scalar(external.scalar, lanes)
        buffer = self.buffers[external.argument]
        at = self._index(external.shape, row, column)
        if external.shape[-1] == 1 and self.columns != 1:
            value = bind(self._values(external, buffer, at, 1))
            return value if lanes == 1 else tirx.Broadcast(value, lanes)
        if valid == lanes or external.padded:
            return bind(self._values(external, buffer, at, lanes))
        part = T.alloc_buffer((lanes,), str(buffer.dtype), scope="local")
        store(part, 0, tirx.const(0, with_lanes(str(buffer.dtype), lanes)), lanes)
        vector_runs(valid, lanes, lambda lane, run: store(part, lane, load(buffer, at + lane, run), run))
        return bind(self._values(external, part, 0, lanes))

    def _values(self, external: External, buffer, at, lanes: int):
        """``lanes`` neighbouring elements as float32."""
        if external.layout is None:
            return load_float(buffer, at, lanes)
        assert external.scalar is not None
        grid = decode_expr(bind(load(buffer, at, lanes)), external.layout, "int32", self.isa)
        return mul(grid.astype(with_lanes("float32", lanes)), self._scalar(external.scalar, lanes))

    def _write(self, var: relax.Var, value, row, column, lanes: int, valid: int) -> None:
        if var in self.scratch_rows:
            buffer = self.scratch_rows[var]
            at = (row - self.first_scratch_row) * self.columns + column
        else:
            buffer, at = self.outputs[var], row * self.columns + column
        if str(buffer.dtype) == "float16":
            value = as_float16(value)
        elif str(buffer.dtype) == BFLOAT16_WORDS:
            value = as_bfloat16(value)
        if valid == lanes:
            store(buffer, at, value, lanes)
            return
        part = T.alloc_buffer((lanes,), str(buffer.dtype), scope="local")
        store(part, 0, value, lanes)
        vector_runs(valid, lanes, lambda lane, run: store(buffer, at + lane, load(part, lane, run), run))

    def _is_written(self, var: relax.Var) -> bool:
        return var in self.outputs or var in self.scratch_rows

    def emit(self, start: relax.Var | None, value, row, column, lanes: int, valid: int) -> None:
        """Finish one vector: ``value`` is the anchor's result (None where the anchor itself is in the members)."""
        values: dict[relax.Expr, object] = {}
        if start is not None:
            value = values[start] = self._named(value, lanes)
            if self._is_written(start):
                self._write(start, value, row, column, lanes, valid)
        for var, call in self.members:
            arguments = [
                values[a] if a in values else self._read(self.externals[a], row, column, lanes, valid)
                for a in tensor_arguments(call)
            ]
            if var in self.absorbed:
                result = arguments[0]
            else:
                result = self._named(self._compute(var, call, arguments, lanes), lanes)
            values[var] = result
            if self._is_written(var):
                self._write(var, result, row, column, lanes, valid)

    @staticmethod
    def _named(value, lanes: int):
        """A vector that several members read, each many times: kept, or TVM copies it into all of them."""
        return keep(value) if lanes > 1 and dtype_of(value).startswith("float") else value

    def _compute(self, var, call, arguments: list, lanes: int):
        name = op_name(call)
        if name == "relax.qfp8.encode":
            reciprocal = arguments[1] if len(arguments) > 1 else self._scalar(self.encode_scalars[var], lanes)
            scaled = bind(mul(arguments[0], reciprocal))
            limit = self._scalar(self.limits[var], lanes) if var in self.limits else None
            return encode_expr(scaled, get_layout(str(call.attrs["layout"])), self.isa, limit)
        if name == "relax.qfp8.interpolate":
            table = build_table(str(call.attrs["function"]), max_error=float(call.attrs["max_error"]))
            return bind(emit_table(table, arguments[0], self.isa))
        if name == "relax.qfp8.halve":
            if str(call.attrs["dtype"]) == "bfloat16":
                return round_to_bfloat16(arguments[0])
            return round_to_float16(arguments[0], self.isa.float16)
        if name == "relax.clip":
            return emit_elementwise(name, tuple(float(bound.value) for bound in call.args[1:]), arguments)
        return emit_elementwise(name, call.attrs, arguments)
