"""AVX2: 256-bit vpmaddwd."""

from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.isa.x86 import broadcast_pair, multiply_add_by

INSTRUCTION_SET = InstructionSet(
    name="avx2",
    lanes=8,
    pair=2,
    registers=16,
    multiply_add=multiply_add_by("llvm.x86.avx2.pmadd.wd", 8),
    broadcast=broadcast_pair(8),
    temporaries=1,
)
