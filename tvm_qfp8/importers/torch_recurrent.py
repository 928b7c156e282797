"""LSTM, GRU and RNN of ``torch.nn`` in exported programs, which torch's decompositions write out step by step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from tvm_qfp8.errors import UnsupportedOperatorError
from tvm_qfp8.importers.recurrent_layer import DirectionWeights, emit_direction
from tvm_qfp8.recurrent_cell import Cell

SIGMOID, TANH = ("Sigmoid", 0.0, 0.0), ("Tanh", 0.0, 0.0)
CELLS = {
    "lstm.input": (Cell("LSTM", (SIGMOID, TANH, TANH)), (0, 3, 1, 2)),
    "gru.input": (Cell("GRU", (SIGMOID, TANH), linear_before_reset=True), (1, 0, 2)),
    "rnn_tanh.input": (Cell("RNN", (TANH,)), (0,)),
    "rnn_relu.input": (Cell("RNN", (("Relu", 0.0, 0.0),)), (0,)),
}
"""The cell of an operator, and torch's gates in the order of ``recurrent_cell``."""


def recurrent_operators() -> list[Any]:
    """Torch's operators of such layers, which stay as they are."""
    import torch

    names = (name.split(".") for name in CELLS)
    return [getattr(getattr(torch.ops.aten, operator), overload) for operator, overload in names]


def recurrent_converters(program: Any) -> dict[str, Callable]:
    """For TVM's front end, by operator; they need the values of the program's parameters."""
    return {name: partial(_convert, program, *cell) for name, cell in CELLS.items()}


def _array(program: Any, node: Any) -> np.ndarray:
    signature = program.graph_signature
    name = signature.inputs_to_parameters.get(node.name) or signature.inputs_to_buffers.get(node.name)
    if name is None:
        raise UnsupportedOperatorError(
            f"weights {node.name!r} of a recurrent layer are computed, not parameters"
        )
    return program.state_dict[name].detach().float().cpu().numpy()


def _convert(program: Any, cell: Cell, order: tuple[int, ...], node: Any, importer: Any) -> Any:
    """aten.lstm(input, states, parameters, biases, layers, dropout, train, bidirectional, batch_first) and the like."""
    from tvm import relax

    x, states, _, has_bias, layers, _, _, bidirectional, batch_first = importer.retrieve_args(node)
    parameters = [_array(program, parameter) for parameter in node.args[2]]
    directions, count = 2 if bidirectional else 1, 4 if has_bias else 2
    if len(parameters) != layers * directions * count:
        raise UnsupportedOperatorError(
            "an LSTM with proj_size is not supported; project its outputs by a Linear layer"
        )
    first = list(states) if cell.states == 2 else [states]
    builder = importer.block_builder

    def gates(array: np.ndarray) -> np.ndarray:
        """Torch's rows in the order of the cell's gates."""
        return np.concatenate([np.split(array, cell.gates)[gate] for gate in order])

    def state(tensor: Any, index: int) -> Any:
        part = builder.emit(relax.op.strided_slice(tensor, [0], [index], [index + 1]))
        return builder.emit(relax.op.reshape(part, list(tensor.ty.shape)[1:]))

    if batch_first:
        x = builder.emit(relax.op.permute_dims(x, [1, 0, 2]))
    # Extents may be open here. No sequence ends before the last step.
    endless = relax.const(np.iinfo(np.int32).max, "int32")
    lengths = builder.emit(relax.op.full([list(x.ty.shape)[1]], endless, "int32"))
    last: list[list] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            weight, recurrent, *bias = map(gates, parameters[index * count : (index + 1) * count])
            bias = bias or [np.zeros(len(weight), np.float32)] * 2
            weights = DirectionWeights(weight, recurrent, bias[0], bias[1])
            begin = [state(tensor, index) for tensor in first]
            result = emit_direction(builder, x, weights, cell, lengths, begin, direction == 1)
            outputs.append(result[0])
            last.append(result[1:])
        x = outputs[0] if directions == 1 else builder.emit(relax.op.concat(outputs, axis=2))
    if batch_first:
        x = builder.emit(relax.op.permute_dims(x, [1, 0, 2]))
    joined = [builder.emit(relax.op.stack(list(parts), axis=0)) for parts in zip(*last, strict=True)]
    return relax.Tuple([x, *joined])
