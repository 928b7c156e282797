"""The kernel of a recurrent layer: the loop over time around the kernel of a dense layer that fits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm import relax, tirx

from tvm_qfp8.format import get_layout
from tvm_qfp8.recurrent_cell import Cell
from tvm_qfp8.relay_passes.dense_kernels import dense_kernel, scaled
from tvm_qfp8.relay_passes.fuse import shape_of
from tvm_qfp8.relay_passes.kernels import Kernel
from tvm_qfp8.relay_passes.operands import Operands, array_of, layout_of
from tvm_qfp8.topi.cuda.recurrent import emit_recurrent as emit_on_gpu
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import pad_channels
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, load
from tvm_qfp8.topi.recurrent import RecurrentBuffers, RecurrentShape, emit_recurrent
from tvm_qfp8.topi.schedules import ScheduleChooser


def recurrent_shape(call) -> RecurrentShape:
    """The static description of a ``qfp8.recurrent`` call."""
    steps, batch, _ = shape_of(call.args[0])
    hidden = shape_of(call.args[5])[1]
    layout = str(call.attrs["layout"])
    return RecurrentShape(
        Cell.of(call.attrs),
        steps,
        batch,
        hidden,
        bool(call.attrs["reverse"]),
        get_layout(layout) if layout else None,
    )


def recurrent_kernel(
    call: relax.Call, isa: InstructionSet, threads: int, max_error: float, choose: ScheduleChooser
) -> Kernel:
    """The kernel of a ``qfp8.recurrent`` call for one instruction set and number of threads."""
    inputs, weight, _, _, lengths, *others = call.args
    shape, operands = recurrent_shape(call), Operands()
    inputs_at, lengths_at = operands.tensor(inputs), operands.tensor(lengths)
    first_at = [operands.tensor(state) for state in others[: shape.cell.states]]
    peepholes_at = [operands.tensor(weights) for weights in others[shape.cell.states :]]
    if isa.name == "cuda":
        emit, described = _on_gpu(call, shape, operands, max_error)
    else:
        emit, described = _on_cpu(call, shape, isa, threads, operands, max_error, choose)
    scale = float(call.attrs["scale"])
    reciprocal = operands.scalar(float(np.float32(1) / np.float32(scale)) if scale else 0.0)
    scalars = operands.finish()
    state = TensorSpec((shape.batch, shape.hidden), "float32")
    outputs = [TensorSpec((shape.steps, *state.shape), "float32"), *[state] * shape.cell.states]

    def body(*buffers) -> None:
        given, results = buffers[: len(operands.specs)], buffers[len(operands.specs) :]
        named = RecurrentBuffers(
            given[inputs_at],
            given[lengths_at],
            [given[at] for at in first_at],
            given[peepholes_at[0]] if peepholes_at else None,
            results[0],
            results[1:],
            load(given[scalars], reciprocal, 1),
        )
        emit(given, named)

    name = shape.cell.kind.lower()

    def function() -> tirx.PrimFunc:
        return build_prim_func(name, [*operands.specs, *outputs], body)

    key = repr((shape, described, operands.specs, outputs, isa.name, threads, max_error))
    return Kernel(name, key, operands.arguments, outputs, function)


def _on_cpu(
    call,
    shape: RecurrentShape,
    isa: InstructionSet,
    threads: int,
    operands: Operands,
    max_error: float,
    choose: ScheduleChooser,
) -> tuple[Callable, object]:
    """``emit(arguments, buffers)``, and what tells the kernels of the products."""
    codes, a, bias = (array_of(argument) for argument in call.args[1:4])
    layout = layout_of(call.args[1])
    emitters, described = [], []
    for first, count in shape.cell.products:
        rows = slice(first * shape.hidden, (first + count) * shape.hidden)
        packed, emit, what = dense_kernel(isa, shape.batch, codes[rows], shape.state, layout, threads, choose)
        constants = (packed, pad_channels(a[rows]), pad_channels(bias[rows]))
        emitters.append((emit, [operands.constant(array) for array in constants]))
        described.append(what)

    def emit_kernel(given, buffers: RecurrentBuffers) -> None:
        def product_of(emit: Callable, at: list[int]) -> Callable:
            weights, a, bias = (given[index] for index in at)
            return lambda operand, finish: emit(operand, weights, scaled(a, bias, finish))

        products = [product_of(*emitter) for emitter in emitters]
        emit_recurrent(isa, shape, buffers, products, max_error)

    return emit_kernel, described


def _on_gpu(call, shape: RecurrentShape, operands: Operands, max_error: float) -> tuple[Callable, object]:
    """As ``_on_cpu``."""
    codes, a, bias = (array_of(argument) for argument in call.args[1:4])
    layout = layout_of(call.args[1])
    at = [operands.constant(array) for array in (np.ascontiguousarray(codes.T), a, bias)]

    def emit_kernel(given, buffers: RecurrentBuffers) -> None:
        weight, a, bias = (given[index] for index in at)
        emit_on_gpu(shape, buffers, weight, layout, a, bias, max_error)

    return emit_kernel, layout
