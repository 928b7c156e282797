"""Every instruction set's float32 multiply-add: layers whose activations are not quantized.

The same micro-kernels take it. A sum of float32 depends on its order, so the order is fixed: one accumulator for each
output, taps row by row, in each the channels, every step a fused multiply-add, rounded once.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx

from tvm_qfp8.topi.float_contract import fused_multiply_add, fused_multiply_add_in_float64
from tvm_qfp8.topi.isa import InstructionSet

ROW_STEPS = 4
"""Activations of one NEON vector."""


def in_floats(isa: InstructionSet) -> InstructionSet:
    """The variant whose operands and accumulators are float32."""
    fused = fused_multiply_add if isa.fused else fused_multiply_add_in_float64

    def broadcast(buffer, index):
        return tirx.Broadcast(buffer.vload([index], "float32"), isa.lanes)

    def element(row, step: int):
        return tirx.Shuffle([row], [tirx.const(step, "int32")] * isa.lanes)

    return replace(
        isa,
        pair=1,
        operand="float32",
        multiply_add=lambda total, a, b: fused(a, b, total),
        broadcast=broadcast,
        temporaries=0,
        row_steps=ROW_STEPS if isa.element else 1,
        element=element if isa.element else None,
        byte_products=None,
        matrix_products=None,
    )
