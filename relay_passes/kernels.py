"""From a group of bindings to one PrimFunc: chooses the kernel of the anchor and emits the rest as its epilogue."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from tvm import relax, tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.relay_passes.cuda_kernels import CUDA_ANCHORS, elementwise_body
from tvm_qfp8.relay_passes.encoded_rows import EncodedRows, cuda_norm_with_encoded_rows
from tvm_qfp8.relay_passes.epilogue import Epilogue
from tvm_qfp8.relay_passes.fuse import Group, op_name
from tvm_qfp8.relay_passes.linear_kernels import LINEAR_ANCHORS
from tvm_qfp8.relay_passes.operands import Emitter, Operands
from tvm_qfp8.relay_passes.row_kernels import ROW_ANCHORS
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, stores_last, vector_runs
from tvm_qfp8.topi.rows import MIN_PARALLEL_ELEMENTS
from tvm_qfp8.topi.schedules import ScheduleChooser, default_schedule
from tvm_qfp8.topi.static_memory import StaticMemory


@dataclass
class Kernel:
    """A kernel to be written: arguments in order (Relax expressions or packed constants), then outputs."""

    name: str
    key: str
    arguments: list[relax.Expr | np.ndarray]
    outputs: list[TensorSpec]
    function: Callable[[], tirx.PrimFunc]


def write_kernel(
    group: Group,
    isa: InstructionSet,
    threads: int,
    max_error: float,
    choose: ScheduleChooser = default_schedule,
    memory: StaticMemory | None = None,
    halves: Mapping[relax.Var, str] = {},
) -> Kernel:
    """The kernel of ``group`` for one instruction set and number of threads.

    ``max_error`` bounds the error of a softmax; interpolated functions carry their own. ``choose`` picks the
    schedules of linear layers; ``memory`` is what kernels may keep between calls; ``halves`` are kept as
    other dtypes.
    """
    anchor_var, anchor = group.members[0]
    name = op_name(anchor)
    operands = Operands(memory, halves)
    encoded = None
    if name in LINEAR_ANCHORS or name in ROW_ANCHORS:
        if group.encode_rows is not None:
            encoded = EncodedRows(group.encode_rows[1], operands, isa)
        body, shape_key = _of_anchor(anchor, isa, threads, operands, max_error, choose, encoded)
        epilogue = Epilogue(group, isa, operands, skip=1)
        start = anchor_var
    else:
        epilogue = Epilogue(group, isa, operands, skip=0)
        if isa.name == "cuda":
            body = elementwise_body(epilogue)
        else:
            body = _elementwise_body(epilogue, isa, threads)
        shape_key = ("elementwise", epilogue.shape)
        start = None
    scalars = operands.finish()
    outputs = [operands.spec(var) for var in group.outputs]
    members_and_more = [*group.members, *([group.encode_rows] if group.encode_rows else [])]
    short = "_".join(op_name(call).split(".")[-1] for _, call in members_and_more)
    if encoded is not None:
        outputs += encoded.outputs

    def function() -> tirx.PrimFunc:
        def emit(*buffers) -> None:
            inputs, results = buffers[: len(operands.specs)], buffers[len(operands.specs) :]
            epilogue.buffers = list(inputs)
            epilogue.scalar_buffer = inputs[scalars]
            epilogue.outputs = dict(zip(group.outputs, results, strict=False))
            if encoded is not None:
                encoded.epilogue, encoded.results = epilogue, results[len(group.outputs) :]
            body(inputs, lambda *position: epilogue.emit(start, *position))

        return build_prim_func(short[:60], [*operands.specs, *outputs], emit)

    members = [(op_name(call), _attributes(call), _wiring(group, call)) for _, call in group.members]
    written = [[var for var, _ in group.members].index(var) for var in group.outputs]
    externals = [(e.argument, e.scalar, e.shape, e.layout) for e in epilogue.externals.values()]
    layout = encoded and (*encoded.encoding, [var for var, _ in group.members].index(encoded.source))
    key = repr((shape_key, members, written, layout, externals, operands.specs, outputs, isa.label, threads))
    return Kernel(short[:60], key, operands.arguments, outputs, function)


def _of_anchor(
    anchor: relax.Call,
    isa: InstructionSet,
    threads: int,
    operands: Operands,
    max_error: float,
    choose: ScheduleChooser,
    encoded: EncodedRows | None,
) -> Emitter:
    name = op_name(anchor)
    if isa.name == "cuda":
        if encoded is not None:
            return cuda_norm_with_encoded_rows(anchor, encoded, operands, max_error)
        return CUDA_ANCHORS[name](anchor, isa, operands, max_error)
    if name in LINEAR_ANCHORS:
        return LINEAR_ANCHORS[name](anchor, isa, threads, operands, choose)
    return ROW_ANCHORS[name](
        anchor, isa, threads, operands, max_error, *([] if encoded is None else [encoded])
    )


def _attributes(call) -> str:
    if op_name(call) == "relax.qfp8.encode":
        return str(call.attrs["layout"])  # the scale is a run-time scalar
    if op_name(call) == "relax.qfp8.batch_matmul":
        return str(call.attrs["transpose_y"])
    return str(call.attrs) + str(
        [float(a.value) for a in call.args if isinstance(a, tirx.FloatImm | tirx.IntImm)]
    )


def _wiring(group: Group, call) -> list:
    inner = {var: index for index, (var, _) in enumerate(group.members)}
    return [inner.get(argument, -1) if isinstance(argument, relax.Var) else -1 for argument in call.args]


def _elementwise_body(epilogue: Epilogue, isa: InstructionSet, threads: int) -> Callable:
    shape = epilogue.shape
    size = int(np.prod(shape, dtype=np.int64))
    flat = all(e.argument is None or e.shape == shape for e in epilogue.externals.values())
    if flat:
        epilogue.columns = size
        epilogue.shape = (size,)
        epilogue.externals = {
            expr: e if e.argument is None else replace(e, shape=(size,))
            for expr, e in epilogue.externals.items()
        }

    def run(row, start, length: int) -> None:
        """``length`` neighbouring elements of a row, some vectors at a time."""
        step = max(1, isa.vectors_at_once // len(epilogue.members)) * isa.lanes
        done = length // step * step
        if done:
            with T.serial(0, length // step) as i:
                with stores_last():
                    for at in range(0, step, isa.lanes):
                        epilogue.emit(None, None, row, start + i * step + at, isa.lanes, isa.lanes)
        if done == length:
            return
        if done and length - done < isa.lanes:
            done = length - isa.lanes  # computed twice rather than in parts
        vector_runs(
            length - done,
            isa.lanes,
            lambda at, lanes: epilogue.emit(None, None, row, start + done + at, lanes, lanes),
        )

    def body(_inputs, _finish) -> None:
        parallel = T.parallel if threads > 1 and size >= MIN_PARALLEL_ELEMENTS else T.serial
        columns = epilogue.columns
        chunk = 4096 if flat and size > 8192 else columns
        if flat:
            with parallel(0, size // chunk) as block:
                run(0, block * chunk, chunk)
            if size % chunk:
                run(0, size // chunk * chunk, size % chunk)
            return
        with parallel(0, size // columns) as row:
            run(row, 0, columns)

    return body
