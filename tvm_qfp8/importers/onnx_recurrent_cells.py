"""One time step of RNN, GRU and LSTM as ONNX nodes (ONNX operator specification)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_qfp8.importers.onnx_emitter import Emitter

Activation = tuple[str, float, float]

# Whether an activation reads alpha and beta, with the specification's defaults.
ACTIVATIONS: dict[str, tuple[float | None, float | None]] = {
    "Relu": (None, None), "Tanh": (None, None), "Sigmoid": (None, None), "Softsign": (None, None),
    "Softplus": (None, None), "Affine": (1.0, 0.0), "LeakyRelu": (0.01, None), "ThresholdedRelu": (1.0, None),
    "ScaledTanh": (1.0, 1.0), "HardSigmoid": (0.2, 0.5), "Elu": (1.0, None),
}  # fmt: skip
DEFAULTS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}


@dataclass
class Direction:
    """What the steps of one direction share."""

    emit: Emitter
    recurrent: np.ndarray
    recurrent_bias: np.ndarray
    peepholes: np.ndarray | None
    index: int
    functions: list[Activation]
    clip: float
    input_forget: bool
    linear_before_reset: bool

    @property
    def hidden(self) -> int:
        return self.recurrent.shape[1]

    def product(self, state: str, first: int, count: int) -> str:
        """``state @ R.T`` for some gates."""
        rows = self.recurrent[first * self.hidden : (first + count) * self.hidden]
        return self.emit("MatMul", state, self.emit.constant(np.ascontiguousarray(rows.T)))

    def activate(self, which: int, x: str) -> str:
        """Clip, then the activation function f, g or h."""
        kind, alpha, beta = self.functions[which]
        emit, x = self.emit, self.emit.clip(x, self.clip)

        def number(value: float) -> str:
            return emit.constant(np.array(value, np.float32))

        if kind == "Affine":
            return emit("Add", emit("Mul", x, number(alpha)), number(beta))
        if kind == "ScaledTanh":
            return emit("Mul", emit("Tanh", emit("Mul", x, number(beta))), number(alpha))
        if kind == "ThresholdedRelu":
            above = emit("Greater", x, number(alpha))
            return emit("Where", above, x, number(0.0))
        if kind == "Softsign":
            return emit("Div", x, emit("Add", emit("Abs", x), number(1.0)))
        if kind == "HardSigmoid":
            return emit(kind, x, alpha=alpha, beta=beta)
        if kind in ("LeakyRelu", "Elu"):
            return emit(kind, x, alpha=alpha)
        return emit(kind, x)

    def complement(self, x: str) -> str:
        """1 - x."""
        return self.emit("Sub", self.emit.constant(np.ones((1, 1), np.float32)), x)


def activations(kind: str, given: dict[str, Any], directions: int) -> list[Activation]:
    """(name, alpha, beta) of all activations of a node; KeyError names an unknown one."""
    names = [name.decode() for name in given.get("activations", [])] or DEFAULTS[kind] * directions
    spelled = {name.lower(): name for name in ACTIVATIONS}
    alphas, betas = iter(given.get("activation_alpha", [])), iter(given.get("activation_beta", []))
    found = []
    for name in names:
        if name.lower() not in spelled:
            raise KeyError(name)
        canonical = spelled[name.lower()]
        alpha, beta = ACTIVATIONS[canonical]
        found.append(
            (
                canonical,
                0.0 if alpha is None else float(next(alphas, alpha)),
                0.0 if beta is None else float(next(betas, beta)),
            )
        )
    return found


def rnn(d: Direction, x: str, h: str) -> list[str]:
    """H = f(x + H R)."""
    return [d.activate(0, d.emit("Add", d.product(h, 0, 1), x))]


def gru(d: Direction, x: str, h: str) -> list[str]:
    """Gates z, r; candidate n; H = (1 - z) n + z H."""
    emit, hidden = d.emit, d.hidden
    x_gates, x_candidate = emit.split(x, [2 * hidden, hidden], 1)
    if d.linear_before_reset:
        gates, candidate = emit.split(d.product(h, 0, 3), [2 * hidden, hidden], 1)
        z, r = emit.split(d.activate(0, emit("Add", gates, x_gates)), [hidden] * 2, 1)
        bias = emit.constant(np.ascontiguousarray(d.recurrent_bias[2 * hidden :]))
        candidate = emit("Mul", r, emit("Add", candidate, bias))
    else:
        z, r = emit.split(d.activate(0, emit("Add", d.product(h, 0, 2), x_gates)), [hidden] * 2, 1)
        candidate = d.product(emit("Mul", r, h), 2, 1)
    n = d.activate(1, emit("Add", candidate, x_candidate))
    return [emit("Add", emit("Mul", d.complement(z), n), emit("Mul", z, h))]


def lstm(d: Direction, x: str, h: str, c: str) -> list[str]:
    """Gates i, o, f, candidate c; C = f C + i c; H = o h(C)."""
    emit, hidden = d.emit, d.hidden
    sums = emit("Add", d.product(h, 0, 4), x)
    if d.peepholes is None:
        gates, candidate = emit.split(sums, [3 * hidden, hidden], 1)
        i, o, f = emit.split(d.activate(0, gates), [hidden] * 3, 1)
    else:
        sum_i, sum_o, sum_f, candidate = emit.split(sums, [hidden] * 4, 1)
        to_i, to_o, to_f = (
            emit.constant(np.ascontiguousarray(p)) for p in d.peepholes[d.index].reshape(3, hidden)
        )
        i = d.activate(0, emit("Add", sum_i, emit("Mul", to_i, c)))
        f = d.activate(0, emit("Add", sum_f, emit("Mul", to_f, c)))
    if d.input_forget:
        f = d.complement(i)
    cell = emit("Add", emit("Mul", f, c), emit("Mul", i, d.activate(1, candidate)))
    if d.peepholes is not None:
        o = d.activate(0, emit("Add", sum_o, emit("Mul", to_o, cell)))
    # The specification's clip is for the gates' inputs; the cell state is not clipped.
    kind = Direction(**{**vars(d), "clip": 0.0})
    return [emit("Mul", o, kind.activate(2, cell)), cell]


CELLS: dict[str, Callable] = {"RNN": rnn, "GRU": gru, "LSTM": lstm}
