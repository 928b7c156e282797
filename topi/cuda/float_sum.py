"""One thread's sum of float32 products: fused multiply-adds in the order of the CPU's kernels (``isa/floats.py``)."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.float_contract import bind, fused_multiply_add
from tvm_qfp8.topi.prim_func import load, store


class FloatSum:
    """An accumulator, zero at first."""

    def __init__(self) -> None:
        self._total = T.alloc_buffer((1,), "float32", scope="local")
        store(self._total, 0, tirx.const(0.0, "float32"), 1)

    def add_product(self, a, b) -> None:
        """Add ``a * b``, rounded once."""
        store(self._total, 0, fused_multiply_add(a, b, load(self._total, 0, 1)), 1)

    def value(self):
        """The sum so far."""
        return bind(load(self._total, 0, 1))
