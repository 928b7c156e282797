"""SSE2, every x86-64: 128-bit pmaddwd."""

from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.isa.x86 import broadcast_pair, multiply_add_by

INSTRUCTION_SET = InstructionSet(
    name="sse2",
    lanes=4,
    pair=2,
    registers=16,
    multiply_add=multiply_add_by("llvm.x86.sse2.pmadd.wd", 4),
    broadcast=broadcast_pair(4),
    temporaries=1,
)
