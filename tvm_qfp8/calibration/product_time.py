"""How long a dense layer or convolution takes by the layouts of its operands.

In products of two tiles of 16 rows of 64 bytes (AMX), where layouts differ most: of bytes; of any other activation
with weights that are bytes in two parts; else of bfloat16, half as many a tile, for which weights are decoded, and
sums taken in blocks that stay exact. It stands for other targets, too: linear values are the fastest of all everywhere.
"""

from __future__ import annotations

import math

from tvm_qfp8.calibration.activations import LINEAR_LAYOUTS, NARROW_LAYOUTS
from tvm_qfp8.calibration.linear import LINEAR_WEIGHTS, Linear
from tvm_qfp8.topi.amx.plan import BLOCK_COST, DECODE_COST
from tvm_qfp8.topi.amx.tiles import BFLOAT16, ROWS, SIGNED

MACS = ROWS * ROWS * SIGNED.most
"""Multiply-adds of a product of bytes."""

EXACT_DEPTH = 264
"""Products of two values of E2M5, up to 252 each, whose sum is exact in float32."""


def product_time(linear: Linear, activation: str, weight: str) -> float:
    """Of one call, with operands in these layouts."""
    columns = linear.weight.shape[linear.weight_axis]
    depth = linear.weight.size // columns
    tiles = math.ceil(linear.macs / linear.weight.size / ROWS)
    if weight in LINEAR_WEIGHTS:
        passes = parts = 1 if activation in LINEAR_LAYOUTS else 2
        kind, decoding = SIGNED, 0.0
    else:
        parts = 1 if activation in (*NARROW_LAYOUTS, *LINEAR_LAYOUTS) else 2
        passes = parts * math.ceil(depth / EXACT_DEPTH)
        kind, decoding = BFLOAT16, DECODE_COST * depth
    sums = parts * math.ceil(depth / kind.most) + (BLOCK_COST * passes if passes > 1 else 0)
    return math.ceil(columns / ROWS) * (tiles * sums + decoding)
