"""The peer: a float32 tile of 8 x 12 by ``fmla`` with packed operands, the form of the fast libraries.

Its operands are packed before, and nobody counts that. Three orders of the same instructions are written out, since
what is best differs between CPUs that run in order.
"""

from __future__ import annotations

ROWS, VECTORS = 8, 3
COLUMNS = 4 * VECTORS
MACS_PER_STEP = ROWS * COLUMNS
ORDERS = ("loads first, addresses count up", "loads first", "loads between")


def float_tile(depth: int, order: str) -> str:
    """Assembly of one tile over ``depth`` steps: products, bias, ReLU, store."""
    up = order == ORDERS[0]
    accumulators = [[f"v{8 + i * VECTORS + j}" for j in range(VECTORS)] for i in range(ROWS)]
    text = [f"movi {register}.2d, #0" for row in accumulators for register in row]
    if order == ORDERS[2]:
        text += _loads_between(accumulators, depth)
    else:
        for _ in range(depth):
            text += ["ldp q0, q1, [x1], #32" if up else "ldp q0, q1, [x1, #32]"]
            text += ["ldp q2, q3, [x2], #32" if up else "ldp q2, q3, [x2, #64]"]
            text += ["ldr q4, [x2], #16" if up else "ldr q4, [x2, #48]"]
            text += [_fmla(accumulators, i, j, (0, 1)) for i in range(ROWS) for j in range(VECTORS)]
            text += ["subs x3, x3, #1", "nop"]
    for index, register in enumerate(register for row in accumulators for register in row):
        text += [f"fadd {register}.4s, {register}.4s, v5.4s", f"fmax {register}.4s, {register}.4s, v6.4s"]
        text += [f"str q{register[1:]}, [x4, #{16 * index}]"]
    return "\n".join(text)


def _fmla(accumulators: list[list[str]], i: int, j: int, rows: tuple[int, int]) -> str:
    return f"fmla {accumulators[i][j]}.4s, v{2 + j}.4s, v{rows[i // 4]}.s[{i % 4}]"


def _loads_between(accumulators: list[list[str]], depth: int) -> list[str]:
    """Every register of operands is loaded again as soon as it has been used; rows take turns between two pairs."""
    text = []
    for step in range(depth):
        rows, following = ((0, 1), (5, 6)) if step % 2 == 0 else ((5, 6), (0, 1))
        for j in range(VECTORS):
            for i in range(ROWS):
                text.append(_fmla(accumulators, i, j, rows))
                if j == 0 and i in (2, 5):
                    text.append(f"ldr q{following[i // 5]}, [x1, #{32 + 16 * (i // 5)}]")
            text.append(f"ldr q{2 + j}, [x2, #{48 + 16 * j}]")
        text += ["subs x3, x3, #1", "nop"]
    return text
