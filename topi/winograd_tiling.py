"""Winograd's algorithm for 3x3 filters in integers: the matrices, and what they do to the range of values.

``F(m x m, 3 x 3)``: m neighbouring outputs in each direction share a window of m + 2 inputs (Lavin and Gray, 2015,
section 4). Each row of their filter transform is multiplied by its denominator, and the inverse transform makes up for
it: every number is an integer, and the result is exactly ``divisor`` times the convolution::

    V = B^T d B        U = G g G^T        divisor * y = A^T [U * V summed over channels] A

Two facts let F(4x4, 3x3) run in 16-bit factors and 32-bit sums. Of unsigned values, V may lie in a range that int16 has
room for, but elsewhere: there it is stored less an ``offset``. And sums are taken modulo 2^32, where an odd factor of
the divisor has an inverse, and only its power of two costs bits: y is exact if it fits those that are left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tvm_qfp8.format import Layout

FILTER = 3


@dataclass(frozen=True, eq=False)
class Tiling:
    """One ``F(m x m, 3 x 3)``."""

    outputs: int
    """m: outputs of a tile in each direction."""
    B_T: np.ndarray
    G: np.ndarray
    A_T: np.ndarray
    divisor: int

    def __repr__(self) -> str:
        return f"F({self.outputs}x{self.outputs}, 3x3)"

    @property
    def window(self) -> int:
        """Inputs of a tile in each direction."""
        return self.outputs + FILTER - 1

    @property
    def positions(self) -> int:
        """Products of a tile, for each channel and output channel."""
        return self.window**2

    @property
    def shift(self) -> int:
        """Of the divisor, the power of two: so many bits of a sum are lost."""
        return (self.divisor & -self.divisor).bit_length() - 1

    @property
    def inverse(self) -> int:
        """Of the divisor's odd factor, modulo 2^32; 1 where there is none."""
        return pow(self.divisor >> self.shift, -1, 2**32)

    @property
    def limit(self) -> int:
        """A sum is found exactly if it is less, and more than minus this."""
        return 2 ** (31 - self.shift)

    def transform_filters(self, grid: np.ndarray) -> np.ndarray:
        """``(..., 3, 3)`` grid values -> ``(..., window, window)``."""
        return self.G @ grid @ self.G.T

    def input_range(self, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
        """Least and greatest V at each position; an unsigned layout's terms of one sign only add up."""
        plus, minus = np.maximum(self.B_T, 0).sum(1), np.maximum(-self.B_T, 0).sum(1)
        positive = np.outer(plus, plus) + np.outer(minus, minus)
        negative = np.outer(plus, minus) + np.outer(minus, plus)
        if layout.signed:
            positive = negative = positive + negative
        return -negative * layout.max_grid, positive * layout.max_grid

    def offsets(self, layout: Layout) -> np.ndarray | None:
        """What V is stored less, at each position; None where no offset makes it fit int16."""
        least, greatest = self.input_range(layout)
        fits = (least >= -(2**15)) & (greatest < 2**15)
        offsets = np.where(fits, 0, (least + greatest) // 2)
        within = (least - offsets >= -(2**15)) & (greatest - offsets < 2**15)
        return offsets if within.all() else None

    def filters_fit(self, layout: Layout) -> bool:
        """Whether U fits int16 for all filters."""
        return int(np.abs(self.G).sum(1).max()) ** 2 * layout.max_grid < 2**15


F2 = Tiling(
    outputs=2,
    B_T=np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]),
    G=np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]),
    A_T=np.array([[1, 1, 1, 0], [0, 1, -1, -1]]),
    divisor=4,
)
"""2.25 times fewer multiplications than the direct form; for all layouts."""

F4 = Tiling(
    outputs=4,
    B_T=np.array(
        [
            [4, 0, -5, 0, 1, 0],
            [0, 4, 4, -1, -1, 0],
            [0, -4, 4, 1, -1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ]
    ),
    G=np.array([[6, 0, 0], [1, 1, 1], [1, -1, 1], [1, 2, 4], [1, -2, 4], [0, 0, 6]]),
    A_T=np.array([[1, 4, 4, 1, 1, 0], [0, 4, -4, 2, -2, 0], [0, 4, 4, 4, 4, 0], [0, 4, -4, 8, -8, 4]]),
    divisor=576,
)
"""4 times fewer; for layouts with grid values up to 508, unsigned, or 252."""
