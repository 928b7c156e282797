"""The table of one function: what a kernel and its NumPy twin need to evaluate it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tvm_qfp8.tables.evaluate import evaluate
from tvm_qfp8.tables.numpy_ops import NumpyOps


@dataclass(frozen=True)
class Table:
    """A function as polynomials on uniform cells, with a proved error bound.

    The argument is brought to ``t = clamp(scale * x + offset, low, high)`` (after the range reduction); the cell is
    ``rint(t / step)`` modulo ``cells``, got by adding ``magic = 1.5 * 2**23 * step``: the sum's low bits are the cell.
    """

    name: str
    reduction: str
    """Which range reduction of ``evaluate`` applies: even, odd, logistic, hinge, direct, exp, log, ..."""
    max_error: float
    """Proved bound of the error in float32 arithmetic, every rounding included (see ``proof``)."""
    observed_error: float
    """Largest error seen on a sample of the whole float32 range."""
    relative: bool
    """The bound is relative to ``|f(x)|``; otherwise to ``max(1, |f(x)|)``."""
    coefficients: tuple[tuple[float, ...], ...] = ()
    """float32 values, ``coefficients[power][cell]``."""
    scale: float = 1.0
    offset: float = 0.0
    low: float = 0.0
    high: float = 0.0
    magic: float = 0.0
    centred: bool = False
    """The polynomials' variable is the distance to the cell's centre; else ``t`` itself, one operation cheaper."""
    hinge: float = 0.0
    """``slope * max(x, hinge)`` is added to the polynomial (reductions even and hinge)."""
    slope: float = 1.0
    inner: Table | None = None
    """The table of log2 on one binade (reduction power)."""
    period: tuple[float, ...] = ()
    """Domain (low, high), 1 / P and the two parts of P (reduction periodic)."""
    continuous: bool = False
    """Neighbouring cells were asked to meet: both give the same float32 at their boundary."""
    reversal: float | None = None
    """Asked to be monotone: where the function rises or falls, results go the other way by at most this, which is
    rounding; 0 for linear cells without a last addition. None where it was not asked."""

    @property
    def cells(self) -> int:
        """Number of cells, a power of two; 0 for a function computed by plain arithmetic."""
        return len(self.coefficients[0]) if self.coefficients else 0

    @property
    def degree(self) -> int:
        """Degree of the polynomials."""
        return len(self.coefficients) - 1

    @property
    def nbytes(self) -> int:
        """Size of the coefficients."""
        return 4 * self.cells * len(self.coefficients)

    def __call__(self, x) -> np.ndarray:
        """The function of ``x`` (any shape, cast to float32), bit-equal with the compiled kernel."""
        x = np.asarray(x, np.float32)
        with np.errstate(all="ignore"):
            return evaluate(self, np.atleast_1d(x), NumpyOps()).reshape(x.shape)
