"""ONNX RNN, GRU and LSTM nodes, which TVM's front end does not know (ONNX operator specification)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.importers.recurrent_layer import DirectionWeights, emit_direction
from tvm_qfp8.recurrent_cell import ACTIVATIONS, GATES, Activation, Cell, table_of
from tvm_qfp8.relay_passes.fuse import shape_of
from tvm_qfp8.tables.families import find_function

DEFAULTS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
PARAMETERS: dict[str, tuple[float | None, float | None]] = {
    "Affine": (1.0, 0.0), "LeakyRelu": (0.01, None), "ThresholdedRelu": (1.0, None), "ScaledTanh": (1.0, 1.0),
    "HardSigmoid": (0.2, 0.5), "Elu": (1.0, None),
}  # fmt: skip
"""Whether an activation function reads alpha and beta, with the specification's defaults."""

WEIGHTS = {1: "W", 2: "R", 3: "B", 7: "P"}
"""Inputs that must be constant."""


def check_recurrent(node: onnx.NodeProto, shapes: dict, constants: dict) -> str | None:
    """What a node has that is not supported, or None."""
    shape = shapes.get(node.input[0], [])
    if len(shape) != 3 or not all(shape):
        return f"an input of open shape {tuple(shape)}"
    for position, name in WEIGHTS.items():
        given = node.input[position] if len(node.input) > position else ""
        if given and given not in constants:
            return f"weights {name} = {given!r} that are not constant"
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    names = {name.lower(): name for name in ACTIVATIONS}
    for name in attributes.get("activations", []):
        if name.decode().lower() not in names:
            return f"activation {name.decode()!r}"
    return None


def activations(kind: str, given: dict[str, Any], directions: int) -> list[Activation]:
    """(name, alpha, beta) of all activation functions of a node."""
    names = [name.decode() for name in given.get("activations", ())] or DEFAULTS[kind] * directions
    spelled = {name.lower(): name for name in ACTIVATIONS}
    alphas, betas = iter(given.get("activation_alpha", ())), iter(given.get("activation_beta", ()))
    found = []
    for name in names:
        canonical = spelled[name.lower()]
        alpha, beta = PARAMETERS.get(canonical, (None, None))
        alpha = 0.0 if alpha is None else float(next(alphas, alpha))
        beta = 0.0 if beta is None else float(next(betas, beta))
        found.append((canonical, alpha, beta))
        table = table_of(found[-1])
        if table is not None:
            find_function(table)  # raises for an alpha out of range
    return found


class _Converter:
    """A converter of TVM's front end for one kind of node."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def get_converter(self, _opset: int):
        """All versions of the operator have one form but for ``layout``."""
        return lambda builder, inputs, given, params: _Layer(self.kind, builder, inputs, given).emit()


CONVERTERS = {kind: _Converter(kind) for kind in GATES}
"""For TVM's front end, by operator."""


class _Layer:
    """One node."""

    def __init__(self, kind: str, builder: relax.BlockBuilder, inputs: list, given: dict[str, Any]) -> None:
        self.kind, self.builder, self.given = kind, builder, given
        self.inputs = [*inputs, *[None] * (8 - len(inputs))]
        self.batch_first = bool(given.get("layout", 0))
        self.weight, self.recurrent = self._weights(1), self._weights(2)
        self.directions, width, self.hidden = self.recurrent.shape
        bias = (
            self._weights(3)
            if self.inputs[3] is not None
            else np.zeros((self.directions, 2 * width), np.float32)
        )
        self.bias = bias.reshape(self.directions, 2, width)

    def _weights(self, position: int) -> np.ndarray:
        return self.inputs[position].value.numpy().astype(np.float32)

    def _moved(self, x: relax.Expr, axes: list[int]) -> relax.Expr:
        """``x`` with axes exchanged where the node has the batch first."""
        return self.builder.emit(relax.op.permute_dims(x, axes)) if self.batch_first else x

    def emit(self) -> relax.Tuple:
        """Y ``(steps, directions, batch, hidden)`` and the last states ``(directions, batch, hidden)``."""
        x = self._moved(self.inputs[0], [1, 0, 2])
        steps, batch, _ = shape_of(x)
        given = self.inputs[4]
        lengths = relax.const(np.full(batch, steps, np.int32)) if given is None else given
        results = [self._direction(x, index, lengths, batch) for index in range(self.directions)]
        outputs, *states = (self._joined(parts, steps, batch) for parts in zip(*results, strict=True))
        outputs = self._moved(outputs, [2, 0, 1, 3])
        return relax.Tuple([outputs, *(self._moved(state, [1, 0, 2]) for state in states)])

    def _direction(self, x: relax.Expr, index: int, lengths: relax.Expr, batch: int) -> list[relax.Var]:
        functions = activations(self.kind, self.given, self.directions)
        count = len(functions) // self.directions
        peepholes = self._weights(7)[index] if self.inputs[7] is not None else None
        cell = Cell(
            self.kind,
            tuple(functions[index * count : (index + 1) * count]),
            float(self.given.get("clip", 0.0)),
            bool(self.given.get("input_forget", 0)),
            self.kind == "GRU" and bool(self.given.get("linear_before_reset", 0)),
            peepholes is not None,
        )
        weights = DirectionWeights(
            self.weight[index], self.recurrent[index], self.bias[index, 0], self.bias[index, 1], peepholes
        )
        states = [self._first(5 + position, index, batch) for position in range(cell.states)]
        reverse = index == 1 or self.given.get("direction") == b"reverse"
        return emit_direction(self.builder, x, weights, cell, lengths, states, reverse)

    def _first(self, position: int, index: int, batch: int) -> relax.Expr:
        """First state ``(batch, hidden)`` of one direction."""
        given = self.inputs[position]
        if given is None:
            return relax.const(np.zeros((batch, self.hidden), np.float32))
        axis = 1 if self.batch_first else 0
        if isinstance(given, GenericConst):
            return relax.const(np.ascontiguousarray(given.value.numpy().take(index, axis)))
        part = self.builder.emit(relax.op.strided_slice(given, [axis], [index], [index + 1]))
        return self.builder.emit(relax.op.reshape(part, (batch, self.hidden)))

    def _joined(self, parts: tuple, steps: int, batch: int) -> relax.Expr:
        """Outputs or last states of all directions."""
        time = (steps,) if len(shape_of(parts[0])) == 3 else ()
        shape = (*time, 1, batch, self.hidden)
        wider = [self.builder.emit(relax.op.reshape(part, shape)) for part in parts]
        return wider[0] if len(wider) == 1 else self.builder.emit(relax.op.concat(wider, axis=len(time)))
