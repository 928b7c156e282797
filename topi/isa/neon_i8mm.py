"""Armv8.6 int8 matrices: ``smmla`` multiplies two rows by two columns over eight steps."""

from tvm import tirx

from tvm_qfp8.topi.isa import InstructionSet


def _multiply_add(acc, a, b):
    return tirx.call_llvm_intrin("int32x4", "llvm.aarch64.neon.smmla.v4i32.v16i8", acc, a, b)


def _broadcast(buffer, index):
    raise NotImplementedError("smmla takes two rows of activations, not one repeated")


INSTRUCTION_SET = InstructionSet(
    name="neon",
    lanes=4,
    pair=8,
    registers=32,
    multiply_add=_multiply_add,
    broadcast=_broadcast,
    row_group=2,
    extension="i8mm",
)
