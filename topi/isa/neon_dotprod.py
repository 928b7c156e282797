"""Armv8.2 dot products: ``sdot`` adds the products of four neighbouring int8 values to each int32 lane."""

from tvm import tirx

from tvm_qfp8.topi.isa import InstructionSet

LANES, PAIR = 4, 4


def _broadcast(buffer, index):
    four = tirx.reinterpret("int32", buffer.vload([index], f"int8x{PAIR}"))
    return tirx.reinterpret("int8x16", tirx.Broadcast(four, LANES))


def _element(row, step: int):
    fours = tirx.reinterpret("int32x4", row)
    return tirx.reinterpret("int8x16", tirx.Shuffle([fours], [tirx.const(step, "int32")] * LANES))


def _multiply_add(acc, a, b):
    return tirx.call_llvm_intrin("int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8", acc, b, a)


INSTRUCTION_SET = InstructionSet(
    name="neon",
    lanes=LANES,
    pair=PAIR,
    registers=32,
    multiply_add=_multiply_add,
    broadcast=_broadcast,
    row_steps=4,
    element=_element,
    extension="dotprod",
)
