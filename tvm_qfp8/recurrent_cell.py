"""The cells of RNN, GRU and LSTM, written once for NumPy and for kernels (ONNX operator specification).

``ops`` are float32 operations as in ``tables.evaluate``; each rounds separately, so that both give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Activation = tuple[str, float, float]
"""Name, alpha, beta."""

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
"""In the weights' order: of GRU z, r and the candidate, of LSTM i, o, f and the candidate."""

TABLES = {"Tanh": "tanh", "Sigmoid": "sigmoid", "Softplus": "softplus", "ScaledTanh": "tanh"}


@dataclass(frozen=True)
class Operands:
    """What one time step computes with; a callable gives the values of one gate.

    Attributes
    ----------
    ops : operations of ``tables.evaluate``
    function : callable ``(name, x)``
        A function of ``tables``.
    product : callable
        The recurrent product with its bias.
    inputs : callable
        The product of the step's input with its bias.
    peephole : callable
        Weights from the cell state to the gates i, o, f.
    states : tuple
        The hidden state, of LSTM the cell state, too.
    """

    ops: Any
    function: Callable
    product: Callable
    inputs: Callable
    peephole: Callable
    states: tuple

    def sum(self, gate: int):
        """What a gate's activation function receives."""
        return self.ops.add(self.product(gate), self.inputs(gate))


@dataclass(frozen=True)
class Cell:
    """What one direction of a recurrent layer computes in a step, but for its weights.

    Attributes
    ----------
    kind : {"RNN", "GRU", "LSTM"}
    functions : tuple of Activation
        f, g and h of the specification, as many as the cell has.
    clip : float
        Bound of what activation functions of gates receive; 0 for none.
    input_forget : bool
        The forget gate is the complement of the input gate.
    linear_before_reset : bool
        The reset gate is multiplied with the recurrent product, not with the state before it.
    peepholes : bool
        Gates of LSTM see the cell state.
    """

    kind: str
    functions: tuple[Activation, ...]
    clip: float = 0.0
    input_forget: bool = False
    linear_before_reset: bool = False
    peepholes: bool = False

    @classmethod
    def of(cls, attributes: Any) -> Cell:
        """From what ``attributes`` gave, read by name."""
        functions = tuple(
            (str(name), float(alpha), float(beta)) for name, alpha, beta in attributes["functions"]
        )
        flags = (bool(attributes[name]) for name in ("input_forget", "linear_before_reset", "peepholes"))
        return cls(str(attributes["kind"]), functions, float(attributes["clip"]), *flags)

    def attributes(self) -> dict[str, Any]:
        """The cell as attributes of an operator."""
        return {**vars(self), "functions": [list(function) for function in self.functions]}

    @property
    def gates(self) -> int:
        """Gates, the candidate among them."""
        return GATES[self.kind]

    @property
    def states(self) -> int:
        """The hidden state, and the cell state of LSTM."""
        return 2 if self.kind == "LSTM" else 1

    @property
    def resets_state(self) -> bool:
        """Whether the candidate has a product of its own, with the state that the reset gate has scaled."""
        return self.kind == "GRU" and not self.linear_before_reset

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """First gate and number of gates of each recurrent product."""
        return ((0, 2), (2, 1)) if self.resets_state else ((0, self.gates),)

    def reset_state(self, at: Operands):
        """The operand of the second product."""
        return at.ops.mul(self._activate(0, at.sum(1), at), at.states[0])

    def step(self, at: Operands) -> tuple:
        """The states after the step."""
        return {"RNN": self._rnn, "GRU": self._gru, "LSTM": self._lstm}[self.kind](at)

    def _rnn(self, at: Operands) -> tuple:
        return (self._activate(0, at.sum(0), at),)

    def _gru(self, at: Operands) -> tuple:
        ops = at.ops
        z = self._activate(0, at.sum(0), at)
        if self.resets_state:
            candidate = at.sum(2)
        else:
            r = self._activate(0, at.sum(1), at)
            candidate = ops.add(ops.mul(r, at.product(2)), at.inputs(2))
        n = self._activate(1, candidate, at)
        return (ops.add(ops.mul(ops.sub(ops.const(1.0), z), n), ops.mul(z, at.states[0])),)

    def _lstm(self, at: Operands) -> tuple:
        ops, cell = at.ops, at.states[1]

        def gate(index: int, seen):
            total = at.sum(index)
            if self.peepholes:
                total = ops.add(total, ops.mul(at.peephole(index), seen))
            return self._activate(0, total, at)

        i = gate(0, cell)
        f = ops.sub(ops.const(1.0), i) if self.input_forget else gate(2, cell)
        cell = ops.keep(ops.add(ops.mul(f, cell), ops.mul(i, self._activate(1, at.sum(3), at))))
        # The specification's clip is for what gates receive; the cell state is not clipped.
        return ops.mul(gate(1, cell), self._function(2, cell, at)), cell

    def _activate(self, which: int, x, at: Operands):
        ops = at.ops
        if self.clip:
            x = ops.minimum(ops.const(self.clip), ops.maximum(ops.const(-self.clip), x))
        return self._function(which, ops.keep(x), at)

    def _function(self, which: int, x, at: Operands):
        name, alpha, beta = self.functions[which]
        return at.ops.keep(_FUNCTIONS[name](at, x, alpha, beta))


def table_of(activation: Activation) -> str | None:
    """The function of ``tables`` that an activation function needs."""
    name, alpha, _ = activation
    return f"elu({alpha!r})" if name == "Elu" else TABLES.get(name)


def _table(name: str) -> Callable:
    return lambda at, x, alpha, beta: at.function(name, x)


def _affine(at: Operands, x, alpha: float, beta: float):
    return at.ops.add(at.ops.mul(x, at.ops.const(alpha)), at.ops.const(beta))


def _leaky_relu(at: Operands, x, alpha: float, _beta: float):
    ops = at.ops
    return ops.select(ops.less(ops.const(0.0), x), x, ops.mul(x, ops.const(alpha)))


def _thresholded_relu(at: Operands, x, alpha: float, _beta: float):
    ops = at.ops
    return ops.select(ops.less(ops.const(alpha), x), x, ops.const(0.0))


def _scaled_tanh(at: Operands, x, alpha: float, beta: float):
    ops = at.ops
    return ops.mul(at.function("tanh", ops.mul(x, ops.const(beta))), ops.const(alpha))


def _hard_sigmoid(at: Operands, x, alpha: float, beta: float):
    ops = at.ops
    return ops.minimum(ops.const(1.0), ops.maximum(ops.const(0.0), _affine(at, x, alpha, beta)))


def _softsign(at: Operands, x, _alpha: float, _beta: float):
    ops = at.ops
    return ops.divide(x, ops.add(ops.absolute(x), ops.const(1.0)))


_FUNCTIONS: dict[str, Callable] = {
    "Tanh": _table("tanh"),
    "Sigmoid": _table("sigmoid"),
    "Softplus": _table("softplus"),
    "Elu": lambda at, x, alpha, _beta: at.function(f"elu({alpha!r})", x),
    "Relu": lambda at, x, _alpha, _beta: at.ops.maximum(at.ops.const(0.0), x),
    "Affine": _affine,
    "LeakyRelu": _leaky_relu,
    "ThresholdedRelu": _thresholded_relu,
    "ScaledTanh": _scaled_tanh,
    "HardSigmoid": _hard_sigmoid,
    "Softsign": _softsign,
}
ACTIVATIONS = tuple(_FUNCTIONS)
"""Names of the activation functions."""
