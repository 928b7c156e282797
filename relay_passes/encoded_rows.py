"""A kernel that finishes row after row encodes them, too, where linear layers read them with a scale for each row.

A row's values are at hand when it is finished: in the first-level cache of a CPU, in the registers of a GPU's threads.
Before::

    normed = R.nn.layer_norm(x, gamma, beta)                 # Group
    encoded = R.qfp8.encode_rows(normed, factors)            # Single

After: the group has ``encode_rows``, its kernel the outputs ``normed``, where others read it, codes and scales.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
from tvm import relax, tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.format import get_layout
from tvm_qfp8.relay_passes.cuda_kernels import emit_rows
from tvm_qfp8.relay_passes.epilogue import Epilogue
from tvm_qfp8.relay_passes.fuse import (
    Group,
    Single,
    joins_channels,
    normalized_axis,
    op_name,
    read_by,
    shape_of,
)
from tvm_qfp8.relay_passes.operands import Emitter, Operands, array_of
from tvm_qfp8.topi.cuda.isa import INSTRUCTION_SET
from tvm_qfp8.topi.encode_rows import (
    coded,
    emit_cpu_rows,
    emit_scale,
    inverse_of,
    scaled_reader,
    store_encoded_row,
)
from tvm_qfp8.topi.float_contract import like
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.prim_func import TensorSpec, store


def with_encoded_rows(
    steps: list[Group | Single], results: set[relax.Var], on_cpu: bool
) -> list[Group | Single]:
    """Let encodes with a scale for each row join the kernels that finish these rows."""
    group_of = {
        var: step
        for step in steps
        if isinstance(step, Group)
        and (
            is_norm_of_rows(step.anchor)
            or on_cpu
            and (joins_channels(step.anchor) or is_softmax_of_rows(step.anchor))
        )
        for var in step.outputs
    }
    reads = Counter(var for step in steps for var in read_by(step))
    kept: list[Group | Single] = []
    for step in steps:
        if isinstance(step, Single) and op_name(step.value) == "relax.qfp8.encode_rows":
            source = step.value.args[0]
            group = group_of.get(source)
            stays = reads[source] > 1 or source in results
            if (
                group is not None
                and group.encode_rows is None
                and _can_encode(group, step.value, stays, on_cpu)
            ):
                group.encode_rows = step.var, step.value
                if on_cpu and not stays:
                    group.outputs.remove(source)
                continue
        kept.append(step)
    return kept


def is_norm_of_rows(call: relax.Call) -> bool:
    """LayerNorm or RMSNorm over the last axis."""
    norm = op_name(call) in ("relax.nn.layer_norm", "relax.nn.rms_norm")
    return norm and normalized_axis(call) == len(shape_of(call.args[0])) - 1


def is_softmax_of_rows(call: relax.Call) -> bool:
    """Softmax over the last axis."""
    return op_name(call) == "relax.nn.softmax" and normalized_axis(call) == len(shape_of(call.args[0])) - 1


def _can_encode(group: Group, call: relax.Call, stays: bool, on_cpu: bool) -> bool:
    """A softmax has no row of its own to read again: it encodes its results while they come, and keeps none.

    Threads of a GPU each read what they have stored themselves, which a rotation would mix.
    """
    rotates = int(call.attrs["rotation"]) > 1
    if not is_softmax_of_rows(group.anchor):
        return on_cpu or not rotates
    plain = not rotates and bool(np.all(array_of(call.args[1]) == 1))
    return plain and not stays and [var for var, _ in group.members] == [call.args[0]]


class EncodedRows:
    """The encode of rows that a kernel finishes, in the same kernel."""

    def __init__(self, call, operands: Operands, isa: InstructionSet) -> None:
        self.layout, self.isa = get_layout(str(call.attrs["layout"])), isa
        self.encoding = self.layout, int(call.attrs["rotation"])
        self.shape, self.source = shape_of(call.args[0]), call.args[0]
        self._factors = operands.constant(array_of(call.args[1]))
        self.outputs = [TensorSpec(self.shape, "uint8"), TensorSpec(self.shape[:-1], "float32")]
        self.epilogue: Epilogue | None = None
        self.results: tuple = ()
        """Codes and scales; known with the epilogue when the kernel is written."""

    def around(self, first, count: int, finish: Callable) -> None:
        """On a CPU: finish some rows and encode them; what nothing else reads stays in scratch memory."""
        assert self.epilogue is not None
        length, stored = self.shape[-1], self.source in self.epilogue.outputs
        if not stored:
            self.epilogue.scratch_rows[self.source] = T.alloc_buffer((count * length,), "float32", align=64)
            self.epilogue.first_scratch_row = first
        with T.serial(0, count) as index:
            finish(T.bind(first + index))
        source = self.epilogue.outputs[self.source] if stored else self.epilogue.scratch_rows[self.source]
        read = scaled_reader(source, self.epilogue.buffers[self._factors], length)
        emit_cpu_rows(
            read,
            first,
            count,
            length,
            self.encoding,
            self.isa,
            self.results,
            None if stored else lambda index: index,
        )

    def begin(self, index, largest):
        """Of a softmax on a CPU: store the scale of a row whose greatest value is known; its reciprocal."""
        scale, reciprocal = emit_scale(largest, like(inverse_of(self.layout), largest))
        store(self.results[1], index, scale, 1)
        return reciprocal

    def code(self, index, value, offset, lanes: int, reciprocal) -> None:
        """Store the codes of a part of such a row."""
        codes = coded(reciprocal, self.layout, self.isa)(value)
        store(self.results[0], index * self.shape[-1] + offset, codes, lanes)

    def by_threads(self, row, index) -> None:
        """On a GPU: encode a row that its threads have stored."""
        assert self.epilogue is not None
        source = self.epilogue.outputs[self.source]
        read = scaled_reader(source, self.epilogue.buffers[self._factors], self.shape[-1])
        values = row.again(lambda offset, lanes: read(index, offset, lanes))
        store_encoded_row(values, values.mapped(tirx.abs), index, self.layout, self.isa, *self.results)


def cuda_norm_with_encoded_rows(
    anchor, encoded: EncodedRows, operands: Operands, max_error: float
) -> Emitter:
    """The kernel of a norm over rows that encodes them, too."""
    return emit_rows(anchor, INSTRUCTION_SET, operands, max_error, encoded.by_threads)
