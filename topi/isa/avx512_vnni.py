"""AVX-512 VNNI: 512-bit vpdpbusd, which multiplies unsigned bytes by signed ones."""

from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.isa.x86 import broadcast_four, multiply_add_bytes_by

INSTRUCTION_SET = InstructionSet(
    name="avx512",
    lanes=16,
    pair=4,
    registers=32,
    spare=8,
    multiply_add=multiply_add_bytes_by("llvm.x86.avx512.vpdpbusd.512", 16),
    broadcast=broadcast_four(16),
    extension="vnni",
    unsigned_activations=True,
    one_product=True,
)
