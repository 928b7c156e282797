"""NEON: ``smlal`` widens int16 products into int32 lanes. Plain vector arithmetic, which LLVM turns into it."""

from tvm import tirx

from tvm_qfp8.topi.isa import InstructionSet

LANES = 4


def _broadcast(buffer, index):
    return tirx.Broadcast(buffer.vload([index], "int16"), LANES)


def _multiply_add(acc, a, b):
    return acc + a.astype("int32x4") * b.astype("int32x4")


INSTRUCTION_SET = InstructionSet(
    name="neon", lanes=LANES, pair=1, registers=32, multiply_add=_multiply_add, broadcast=_broadcast
)
