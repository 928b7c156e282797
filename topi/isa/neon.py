"""NEON: ``smlal`` widens int16 products into int32 lanes. Plain vector arithmetic, which LLVM turns into it.

The activation is one lane of a vector of eight steps: ``smlal`` takes it from there, without repeating it first.
"""

from tvm import tirx

from tvm_qfp8.topi.isa import InstructionSet

LANES = 4


def _broadcast(buffer, index):
    return tirx.Broadcast(buffer.vload([index], "int16"), LANES)


def _element(row, step: int):
    return tirx.Shuffle([row], [tirx.const(step, "int32")] * LANES)


def _multiply_add(acc, a, b):
    return acc + a.astype("int32x4") * b.astype("int32x4")


INSTRUCTION_SET = InstructionSet(
    name="neon",
    lanes=LANES,
    pair=1,
    registers=32,
    multiply_add=_multiply_add,
    broadcast=_broadcast,
    row_steps=8,
    element=_element,
    float16=True,
)
