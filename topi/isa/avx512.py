"""AVX-512BW: 512-bit vpmaddwd."""

from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.isa.x86 import broadcast_pair, multiply_add_by

INSTRUCTION_SET = InstructionSet(
    name="avx512",
    lanes=16,
    pair=2,
    registers=32,
    spare=8,
    multiply_add=multiply_add_by("llvm.x86.avx512.pmaddw.d.512", 16),
    broadcast=broadcast_pair(16),
)
