"""The operations of ``tables.evaluate`` on float32 and int32 NumPy arrays."""

from __future__ import annotations

import numpy as np


class NumpyOps:
    """float32 in, float32 out; integers are int32 and wrap."""

    scales_by_powers = False
    """Has ``rint`` and ``scale``, instructions for exponentials."""

    def const(self, value: float):
        return np.float32(value)

    def add(self, a, b):
        return np.add(a, b, dtype=np.float32)

    def add_on_multipliers(self, a, b):
        """As ``add``; some machines have other units for it."""
        return self.add(a, b)

    def sub(self, a, b):
        return np.subtract(a, b, dtype=np.float32)

    def mul(self, a, b):
        return np.multiply(a, b, dtype=np.float32)

    def divide(self, a, b):
        return np.divide(a, b, dtype=np.float32)

    def sqrt(self, x):
        return np.sqrt(x, dtype=np.float32)

    def minimum(self, a, b):
        return np.where(a < b, a, b).astype(np.float32)

    def maximum(self, a, b):
        return np.where(a > b, a, b).astype(np.float32)

    def absolute(self, x):
        return np.abs(x)

    def less(self, a, b):
        return a < b

    def select(self, condition, a, b):
        return np.where(condition, a, b).astype(np.float32)

    def bits(self, x):
        return np.ascontiguousarray(x, np.float32).view(np.int32)

    def from_bits(self, bits):
        return np.ascontiguousarray(bits, np.int32).view(np.float32)

    def to_float(self, integer):
        return integer.astype(np.float32)

    def keep(self, value):
        """Name a value that is used more than once."""
        return value

    def wide(self, integer):
        """int32, taken as unsigned, to int64."""
        return integer.astype(np.int64) & np.int64(0xFFFFFFFF)

    def wide_const(self, value: int):
        return np.int64(value)

    def narrow(self, wide):
        """The low 32 bits of int64 as int32."""
        return wide.astype(np.int32)

    def int_const(self, value: int):
        return np.int32(value)

    def lookup(self, coefficients, index):
        """One vector per power of the coefficients of cell ``index`` modulo the number of cells."""
        cell = index & np.int32(len(coefficients[0]) - 1)
        return [np.asarray(values, np.float32)[cell] for values in coefficients]
