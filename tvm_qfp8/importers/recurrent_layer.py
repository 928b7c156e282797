"""Recurrent layers of any front end in Relax: one matmul with the inputs of all steps, then the loop over time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import relax

from tvm_qfp8.recurrent_cell import Cell
from tvm_qfp8.relay_passes import qfp8_ops


@dataclass(frozen=True)
class DirectionWeights:
    """Weights of one direction, float32, with gates in the order of ``recurrent_cell``.

    Attributes
    ----------
    weight : array ``(gates * hidden, input)``
    recurrent : array ``(gates * hidden, hidden)``
    bias, recurrent_bias : arrays ``(gates * hidden,)``
    peepholes : array ``(3 * hidden,)`` or None
    """

    weight: np.ndarray
    recurrent: np.ndarray
    bias: np.ndarray
    recurrent_bias: np.ndarray
    peepholes: np.ndarray | None = None


def emit_direction(
    builder: relax.BlockBuilder,
    x: relax.Expr,
    weights: DirectionWeights,
    cell: Cell,
    lengths: relax.Expr,
    states: list[relax.Expr],
    reverse: bool,
) -> list[relax.Var]:
    """One direction over ``x`` float32 ``(steps, batch, input)``.

    ``lengths`` int32 ``(batch,)``; first ``states`` float32 ``(batch, hidden)``. Returns outputs
    ``(steps, batch, hidden)`` and the last states.
    """
    width, hidden = weights.recurrent.shape
    bias, recurrent_bias = weights.bias + weights.recurrent_bias, np.zeros(width, np.float32)
    if cell.linear_before_reset:
        # What the reset gate multiplies stays with the recurrent product.
        candidate = slice(2 * hidden, None)
        bias[candidate] = weights.bias[candidate]
        recurrent_bias[candidate] = weights.recurrent_bias[candidate]
    product = builder.emit(relax.op.matmul(x, relax.const(np.ascontiguousarray(weights.weight.T))))
    inputs = builder.emit(relax.op.add(product, relax.const(bias)))
    constants = [np.ascontiguousarray(weights.recurrent), np.ones(width, np.float32), recurrent_bias]
    peepholes = [] if weights.peepholes is None else [relax.const(weights.peepholes)]
    arguments = [inputs, *map(relax.const, constants), lengths, *states, *peepholes]
    result = builder.emit(qfp8_ops.recurrent(arguments, cell, reverse=reverse))
    return [builder.emit(relax.TupleGetItem(result, index)) for index in range(1 + cell.states)]
