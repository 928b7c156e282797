"""AVX-VNNI: 256-bit vpdpbusd, for processors without AVX-512."""

from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.isa.x86 import broadcast_four, multiply_add_bytes_by

INSTRUCTION_SET = InstructionSet(
    name="avx2",
    lanes=8,
    pair=4,
    registers=16,
    multiply_add=multiply_add_bytes_by("llvm.x86.avx512.vpdpbusd.256", 8),
    broadcast=broadcast_four(8),
    extension="vnni",
    unsigned_activations=True,
    one_product=True,
)
