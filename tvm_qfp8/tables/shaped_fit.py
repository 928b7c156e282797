"""The best cells of one degree under the constraints of a ``Shape``: one linear program over all cells.

Minimax approximation is a linear program in the coefficients (Rivlin, An Introduction to the Approximation of
Functions, 1969): minimise E subject to -E <= w (p - g) <= E at points. That cells meet, pass through points and rise
or fall are linear constraints, too. The unknowns are the changes to the free fits, in units of the free fits' error,
so that the solver's tolerance counts relative to that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import chebyshev
from scipy import optimize, sparse

from tvm_qfp8.tables.fit import fit_polynomial
from tvm_qfp8.tables.shape import Course

NODES = 24


@dataclass(frozen=True)
class Interval:
    """One cell, and the points ``(t, value)`` that its polynomial passes through."""

    low: float
    high: float
    pins: tuple[tuple[float, float], ...]

    def local(self, t) -> np.ndarray:
        """``t`` on a scale from -1 to 1."""
        return (np.asarray(t, np.float64) - (self.low + self.high) / 2) / ((self.high - self.low) / 2)

    def place(self, z: np.ndarray) -> np.ndarray:
        """The inverse of ``local``."""
        return (self.low + self.high) / 2 + (self.high - self.low) / 2 * z


def fit_shaped(
    function: Callable[[np.ndarray], np.ndarray],
    cells: Sequence[Interval],
    degree: int,
    weight: Callable[[np.ndarray], np.ndarray],
    joined: bool,
    course: Course | None,
) -> list[np.polynomial.Chebyshev] | None:
    """Polynomials in ``t`` of neighbouring cells, None where the constraints contradict each other.

    Parameters
    ----------
    function, weight
        float64 ``t`` to the value to approximate and the weight of its error.
    joined
        Neighbours meet at their common boundary.
    course
        Where the polynomials rise and fall; None leaves them free.
    """
    free = [_free_fit(function, cell, degree, weight) for cell in cells]
    z = np.cos(np.pi * np.arange(NODES) / (NODES - 1))
    basis, slopes = chebyshev.chebvander(z, degree), _slopes(z, degree)
    errors = [_values(cell, z, f, function, weight) for cell, f in zip(cells, free, strict=True)]
    unit = max(max(float(np.abs(w * e).max()) for w, e in errors), 1e-12)
    columns = len(cells) * (degree + 1)
    less = _Rows(columns + 1)
    equal = _Rows(columns + 1)
    for k, (cell, fitted, (w, error)) in enumerate(zip(cells, free, errors, strict=True)):
        at = k * (degree + 1)
        for sign in (1.0, -1.0):
            less.add(at, sign * w[:, None] * basis, -sign * w * error / unit, last=-1.0)
        for t, value in cell.pins:
            local = cell.local([t])
            gap = value - chebyshev.chebval(local, fitted)
            equal.add(at, chebyshev.chebvander(local, degree), gap / unit)
        if joined and k + 1 < len(cells):
            gap = chebyshev.chebval(-1.0, free[k + 1]) - chebyshev.chebval(1.0, fitted)
            ends = chebyshev.chebvander(np.array([1.0, -1.0]), degree)
            equal.add(at, np.concatenate([ends[0], -ends[1]])[None], np.array([gap / unit]))
        if course is not None:
            sign_at = course.sign(cell.place(z))
            less.add(at, -sign_at[:, None] * slopes, sign_at * (slopes @ fitted) / unit)
            for turn in course.turns:
                if cell.low < turn < cell.high:
                    row = _slopes(cell.local([turn]), degree)
                    equal.add(at, row, -(row @ fitted) / unit)
    cost = np.append(np.zeros(columns), 1.0)
    bounds = [(None, None)] * columns + [(0, None)]
    found = optimize.linprog(cost, *less.system(), *equal.system(), bounds=bounds, method="highs")
    if not found.success:
        return None
    changes = found.x[:-1].reshape(len(cells), degree + 1) * unit
    return [
        np.polynomial.Chebyshev(f + change, domain=[cell.low, cell.high])
        for cell, f, change in zip(cells, free, changes, strict=True)
    ]


class _Rows:
    """Rows of a sparse system with right-hand sides; the last column is E."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.blocks: list[tuple[int, np.ndarray, float]] = []
        self.right: list[np.ndarray] = []

    def add(self, at: int, block: np.ndarray, right: np.ndarray, last: float = 0.0) -> None:
        self.blocks.append((at, block, last))
        self.right.append(right)

    def system(self):
        if not self.blocks:
            return None, None
        matrix = sparse.lil_matrix((sum(len(b) for _, b, _ in self.blocks), self.columns))
        row = 0
        for at, block, last in self.blocks:
            matrix[row : row + len(block), at : at + block.shape[1]] = block
            if last:
                matrix[row : row + len(block), -1] = last
            row += len(block)
        return matrix.tocsr(), np.concatenate(self.right)


def _free_fit(function, cell: Interval, degree: int, weight) -> np.ndarray:
    """Chebyshev coefficients of the best fit without constraints."""
    middle = (cell.low + cell.high) / 2
    powers = fit_polynomial(function, cell.low, cell.high, degree, middle, weight=weight)
    half = (cell.high - cell.low) / 2
    series = chebyshev.poly2cheb(powers * half ** np.arange(degree + 1))
    return np.pad(series, (0, degree + 1 - len(series)))


def _values(cell: Interval, z: np.ndarray, fitted: np.ndarray, function, weight):
    """Weights and errors of the free fit at the points ``z``."""
    t = cell.place(z)
    return weight(t), chebyshev.chebval(z, fitted) - function(t)


def _slopes(z, degree: int) -> np.ndarray:
    """Derivatives of the Chebyshev polynomials at ``z``, ``(len(z), degree + 1)``."""
    z = np.atleast_1d(z)
    return np.stack([chebyshev.chebval(z, chebyshev.chebder(one)) for one in np.eye(degree + 1)], axis=1)
