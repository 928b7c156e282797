"""What a kernel reads: its arguments, in order, and the scalars that it takes from one small array."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tvm import relax

from tvm_qfp8 import dtype
from tvm_qfp8.format import Layout
from tvm_qfp8.relay_passes.fuse import shape_of
from tvm_qfp8.topi.prim_func import TensorSpec
from tvm_qfp8.topi.static_memory import StaticMemory

Emitter = tuple[Callable[..., None], Any]
"""``body(inputs, finish)``, which emits a kernel's loops, and a description that tells equal kernels."""


def storage_dtype(name: str) -> str:
    """uint8 for a QFP8 data type, any other dtype unchanged."""
    return "uint8" if name.startswith("custom[qfp8") else name


def layout_of(expr: relax.Expr) -> Layout | None:
    """The layout of a QFP8 tensor, None for float32."""
    return dtype.layout_of(expr.ty.dtype)


def array_of(constant: relax.Expr) -> np.ndarray:
    """The values of a constant; codes as uint8."""
    if layout_of(constant) is not None:
        return dtype.tensor_codes(constant.value)
    return constant.value.numpy()


class Operands:
    """Collects the tensors a kernel reads. ``scalars`` go to one small float32 argument, so that kernels that
    differ only in scales are written once. ``memory`` is what kernels may keep between calls, None for nothing;
    ``halves`` are float32 tensors that are kept in half the memory, and as what."""

    def __init__(self, memory: StaticMemory | None = None, halves: Mapping[relax.Var, str] = {}) -> None:
        self.memory, self.halves = memory, halves
        self.arguments: list[relax.Expr | np.ndarray] = []
        self.specs: list[TensorSpec] = []
        self.scalars: list[float] = []
        self._index: dict[relax.Expr, int] = {}

    def tensor(self, expr: relax.Expr) -> int:
        if expr not in self._index:
            self._index[expr] = self._append(expr, self.spec(expr))
        return self._index[expr]

    def spec(self, expr: relax.Expr) -> TensorSpec:
        """How a tensor is kept."""
        dtype = self.halves.get(expr) or storage_dtype(str(expr.ty.dtype))
        return TensorSpec(shape_of(expr), dtype)

    def constant(self, value: np.ndarray) -> int:
        return self._append(value, TensorSpec(value.shape, str(value.dtype)))

    def scalar(self, value: float) -> int:
        self.scalars.append(float(value))
        return len(self.scalars) - 1

    def finish(self) -> int:
        """Append the scalars; the index of their argument."""
        return self.constant(np.asarray(self.scalars or [0.0], np.float32))

    def _append(self, value, spec: TensorSpec) -> int:
        self.arguments.append(value)
        self.specs.append(spec)
        return len(self.arguments) - 1
