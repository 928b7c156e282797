"""NEON bytes without dot products: ``smull`` and ``smlal`` make int16 products, ``sadalp`` adds pairs of them to int32.

For Cortex-A72 and the like. Sixteen products in three instructions, where ``smlal`` makes twelve of int16 values, and
of these three only two take the multiplier. One int16 lane holds the sum of two products, of an activation of -128 to
127 and a weight of -127 to 127 each: it fits. The two products of a lane come from both halves of a vector, so weights
lie that way: the first two steps of all columns, then the other two.
"""

from tvm import tirx

from tvm_qfp8.topi.float_contract import bind
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.prim_func import load

LANES, PAIR = 4, 4
HALF = LANES * PAIR // 2
REGISTERS = 24
"""Of 32, what LLVM needs no memory beside: it computes many products before it adds the first. (Were they named as
``temporaries`` the loop would be unrolled, and all products of several steps came first.)"""


def _broadcast(buffer, index):
    halves = []
    for step in (0, 2):
        two = tirx.reinterpret("int16", load(buffer, index + step, 2))
        halves.append(bind(tirx.reinterpret(f"int8x{HALF}", tirx.Broadcast(two, LANES))))
    return _take(halves, range(2 * HALF))


def _take(parts: list, lanes: range):
    return tirx.Shuffle(parts, [tirx.const(lane, "int32") for lane in lanes])


def _multiply_add(acc, a, b):
    low, high = (
        _take([a], half).astype(f"int16x{HALF}") * _take([b], half).astype(f"int16x{HALF}")
        for half in (range(HALF), range(HALF, 2 * HALF))
    )
    pairs = tirx.call_llvm_intrin("int32x4", "llvm.aarch64.neon.saddlp", low + high)
    return acc + pairs


INSTRUCTION_SET = InstructionSet(
    name="neon",
    lanes=LANES,
    pair=PAIR,
    registers=REGISTERS,
    multiply_add=_multiply_add,
    broadcast=_broadcast,
    extension="mull",
    one_product=True,
    multiplications=2,
    halved_pairs=True,
)
