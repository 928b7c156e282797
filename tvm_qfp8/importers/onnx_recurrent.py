"""ONNX RNN, GRU and LSTM nodes, which TVM does not import, unrolled over time.

``x @ W`` of all time steps and both directions is one MatMul; the recurrent product, the gates and the state updates
are written once per step. Equations: ONNX operator specification, RNN, GRU and LSTM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from tvm_qfp8.errors import UnsupportedOperatorError
from tvm_qfp8.importers.onnx_emitter import Emitter
from tvm_qfp8.importers.onnx_operators import attributes, describe, inferred_shapes
from tvm_qfp8.importers.onnx_qdq import constant_tensors
from tvm_qfp8.importers.onnx_recurrent_cells import CELLS, Activation, Direction, activations

LONGEST = 512  # steps of an unrolled loop: beyond it compilation takes minutes
Optional = str | None


def unroll_recurrent(model: onnx.ModelProto) -> None:
    """Write out recurrent nodes, in place.

    Raises
    ------
    UnsupportedOperatorError
        Weights computed at run time, an open shape, more than ``LONGEST`` steps, or an unknown activation.
    """
    if not any(node.op_type in CELLS and node.domain in ("", "ai.onnx") for node in model.graph.node):
        return
    shapes = inferred_shapes(model)
    constants = {name: numpy_helper.to_array(tensor) for name, tensor in constant_tensors(model).items()}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type in CELLS and node.domain in ("", "ai.onnx"):
            emit = Emitter(model, next(filter(None, node.output)))
            _Layer(node, shapes, constants, emit).write()
            nodes += emit.nodes
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


class _Layer:
    """One recurrent node."""

    def __init__(self, node: onnx.NodeProto, shapes: dict, constants: dict, emit: Emitter) -> None:
        self.node, self.constants, self.emit = node, constants, emit
        self.given: dict[str, Any] = attributes(node)
        shape = shapes.get(node.input[0], [])
        if len(shape) != 3 or not all(shape):
            raise self._refused(f"an input of open shape {tuple(shape)}")
        self.batch_first = bool(self.given.get("layout", 0))
        self.steps, self.batch = (shape[1], shape[0]) if self.batch_first else (shape[0], shape[1])
        if self.steps > LONGEST:
            raise self._refused(f"{self.steps} time steps (at most {LONGEST})")
        self.weight, self.recurrent = self._weights(1), self._weights(2)
        self.directions, width, self.hidden = self.recurrent.shape
        bias = self._weights(3) if self._input(3) else np.zeros((self.directions, 2 * width), np.float32)
        self.bias = bias.reshape(self.directions, 2, width)

    def _refused(self, what: str) -> UnsupportedOperatorError:
        return UnsupportedOperatorError(
            f"{describe(self.node)} with {what} is not supported; export it with constant weights, fixed shapes and "
            "standard activations"
        )

    def _input(self, index: int) -> str:
        return self.node.input[index] if len(self.node.input) > index else ""

    def _weights(self, index: int) -> np.ndarray:
        if self._input(index) not in self.constants:
            raise self._refused(f"weights {self._input(index)!r} that are not constant")
        return self.constants[self._input(index)].astype(np.float32)

    def write(self) -> None:
        """Emit the whole layer."""
        emit, kind = self.emit, self.node.op_type
        x = self.node.input[0]
        if self.batch_first:
            x = emit("Transpose", x, perm=[1, 0, 2])
        # What multiplies the reset gate stays with the recurrent product (GRU, linear_before_reset).
        separate = kind == "GRU" and bool(self.given.get("linear_before_reset", 0))
        bias = self.bias.sum(1)
        if separate:
            bias[:, 2 * self.hidden :] = self.bias[:, 0, 2 * self.hidden :]
        matrix = np.ascontiguousarray(np.concatenate(list(self.weight), axis=0).T)
        inputs = emit("Add", emit("MatMul", x, emit.constant(matrix)), emit.constant(bias.reshape(-1)))
        width = self.weight.shape[1]
        per_direction = emit.split(inputs, [width] * self.directions, 2)
        masks = self._masks()
        results = []
        for index in range(self.directions):
            direction = Direction(
                emit,
                self.recurrent[index],
                self.bias[index, 1],
                _peepholes(self),
                index,
                self._functions(index),
                float(self.given.get("clip", 0.0)),
                bool(self.given.get("input_forget", 0)),
                separate,
            )
            results.append(self._loop(per_direction[index], direction, masks))
        self._outputs(results)

    def _functions(self, index: int) -> list[Activation]:
        try:
            found = activations(self.node.op_type, self.given, self.directions)
        except KeyError as error:
            raise self._refused(f"activation {error.args[0]!r}") from None
        count = len(found) // self.directions
        return found[index * count : (index + 1) * count]

    def _initial(self, position: int, index: int) -> str:
        """Initial state ``(batch, hidden)`` of one direction."""
        name = self._input(position)
        if not name:
            return self.emit.constant(np.zeros((self.batch, self.hidden), np.float32))
        part = self.emit.split(name, [1] * self.directions, 1 if self.batch_first else 0)[index]
        return self.emit.reshape(part, (self.batch, self.hidden))

    def _masks(self) -> list[str] | None:
        """For each step whether each sequence still runs, bool ``(batch, 1)``; None if all run to the end."""
        name = self._input(4)
        if not name:
            return None
        lengths = self.constants.get(name)
        if lengths is None:
            column = self.emit.reshape(name, (self.batch, 1))
            return [
                self.emit("Less", self.emit.constant(np.array([[t]], np.int32)), column)
                for t in range(self.steps)
            ]
        if (lengths >= self.steps).all():
            return None
        return [self.emit.constant((t < lengths).reshape(-1, 1)) for t in range(self.steps)]

    def _loop(
        self, inputs: str, direction: Direction, masks: list[str] | None
    ) -> tuple[list[str], list[str]]:
        """Outputs of all steps in order of time, and the last states."""
        emit = self.emit
        width = self.weight.shape[1]
        parts = emit.split(inputs, [1] * self.steps, 0)
        backwards = direction.index == 1 or self.given.get("direction") == b"reverse"
        states = [self._initial(5, direction.index)]
        if self.node.op_type == "LSTM":
            states.append(self._initial(6, direction.index))
        cell: Callable = CELLS[self.node.op_type]
        outputs = [""] * self.steps
        zero = emit.constant(np.zeros((1, 1), np.float32)) if masks else ""
        for t in reversed(range(self.steps)) if backwards else range(self.steps):
            new = cell(direction, emit.reshape(parts[t], (self.batch, width)), *states)
            outputs[t] = new[0]
            if masks:
                outputs[t] = emit("Where", masks[t], new[0], zero)
                new = [emit("Where", masks[t], n, old) for n, old in zip(new, states, strict=True)]
            states = new
        return outputs, states

    def _outputs(self, results: list[tuple[list[str], list[str]]]) -> None:
        """Y ``(steps, directions, batch, hidden)`` and the last states ``(directions, batch, hidden)``."""
        emit, node = self.emit, self.node
        if node.output[0]:
            shape = (1, 1, self.batch, self.hidden)
            order = [outputs[t] for t in range(self.steps) for outputs, _ in results]
            parts = [emit.reshape(name, shape) for name in order]
            y = emit.reshape(
                emit("Concat", *parts, axis=0), (self.steps, self.directions, self.batch, self.hidden)
            )
            if self.batch_first:
                y = emit("Transpose", y, perm=[2, 0, 1, 3])
            emit.rename(y, node.output[0])
        for position, name in enumerate(list(node.output)[1:]):
            if not name:
                continue
            last = [emit.reshape(s[position], (1, self.batch, self.hidden)) for _, s in results]
            state = emit("Concat", *last, axis=0)
            if self.batch_first:
                state = emit("Transpose", state, perm=[1, 0, 2])
            emit.rename(state, name)


def _peepholes(layer: _Layer) -> np.ndarray | None:
    """``(directions, 3 * hidden)`` weights of LSTM from the cell state to the gates i, o, f."""
    return layer._weights(7) if layer._input(7) else None
