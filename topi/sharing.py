"""How threads share a kernel of a linear layer: by rows of its output, or by panels of output channels.

By rows every thread decodes all weights; by panels one thread brings the activations while the others wait. Whichever
leaves the busiest thread less to do is the default. A kernel shared by panels costs one thread nothing.
"""

from __future__ import annotations

from tvm_qfp8.topi.panels import balanced_blocks, round_up

DECODING = 12
"""Instructions that decode a vector of weights, about; multiplying it by a row is one."""
BRINGING = 0.06
"""Of multiplying by all weights, bringing activations takes about so much."""


def favours_rows(rows: int, step: int, panels: int, threads: int, decodes: bool) -> bool:
    """Whether threads had better share ``rows``, in multiples of ``step``, than ``panels`` of weights."""
    decoding = DECODING if decodes else 0
    by_rows = round_up(-(-rows // threads), step) + decoding
    most_panels = -(-panels // threads) / max(1, panels)
    by_panels = (rows + decoding) * most_panels + BRINGING * rows
    return by_rows <= by_panels


def shared_blocks(extent: int, most: int, threads: int, multiple: int = 1) -> tuple[int, int]:
    """As ``balanced_blocks``, and as many for each thread."""
    count = round_up(-(-extent // max(1, most)), threads)
    return balanced_blocks(extent, -(-extent // max(1, count)), multiple)


def rows_of_block(rows: int, threads: int) -> int:
    """Half of what a thread gets, so that fewer threads share them evenly, too; all of it where halves are more."""
    whole, half = -(-rows // threads), -(-rows // (2 * threads))
    return half if 2 * half == whole else whole
