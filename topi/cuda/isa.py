"""What kernel generators need to know of a GPU: code is written for one thread, so vectors have one lane."""

from __future__ import annotations

from dataclasses import replace

from tvm_qfp8.topi.isa import InstructionSet

INSTRUCTION_SET = InstructionSet(
    name="cuda",
    lanes=1,
    pair=1,
    registers=255,
    multiply_add=lambda acc, a, b: acc + a.astype("int32") * b.astype("int32"),
    broadcast=lambda buffer, index: buffer.vload([index], "int16"),
)
HOPPER = replace(INSTRUCTION_SET, extension="wgmma")
"""GPUs whose tensor cores multiply for four warps at once."""
