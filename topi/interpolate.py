"""Evaluates a table inside a kernel, as a TIR expression on a float32 scalar or vector.

The sequence of operations is ``tables.evaluate``; here stand the operations and the look-up of coefficients, which
is the only part that differs between instruction sets: one ``vpermps`` finds 8 coefficients on AVX2 and 16 on
AVX-512, ``tbl`` finds 16 on NEON, and elsewhere a tree of bitwise selections does. All give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm import tirx

from tvm_qfp8.tables.evaluate import evaluate
from tvm_qfp8.tables.table import Table
from tvm_qfp8.topi.cuda.device import look_up
from tvm_qfp8.topi.float_contract import add, bind, lanes_of, mul, sub, with_lanes
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.prim_func import keep


def emit_table(table: Table, x, isa: InstructionSet):
    """``table(x)`` for ``x`` float32 of any number of lanes, in an open IRBuilder.

    Bit-equal with ``table(x)`` in NumPy on every instruction set.
    """
    native, _ = LOOK_UPS[isa.name]
    lanes = lanes_of(x)
    looks_up = table.cells > 1 or (table.inner is not None and table.inner.cells > 1)
    if not looks_up or native == 1 or lanes == native:
        return evaluate(table, bind(x), TirOps(lanes, isa))
    if lanes > native:
        parts = [
            evaluate(table, lanes_from(x, start, native), TirOps(native, isa))
            for start in range(0, lanes, native)
        ]
        return bind(tirx.Shuffle(parts, _indices(0, lanes)))
    # Fewer lanes than a register: the others compute the same values again.
    repeated = (
        tirx.Broadcast(x, native)
        if lanes == 1
        else tirx.Shuffle([x] * (native // lanes), _indices(0, native))
    )
    return lanes_from(evaluate(table, bind(repeated), TirOps(native, isa)), 0, lanes)


def _indices(start: int, count: int) -> list:
    return [tirx.const(i, "int32") for i in range(start, start + count)]


def lanes_from(x, start: int, lanes: int):
    """``lanes`` of a vector from ``start``."""
    x = bind(x)
    return bind(tirx.Shuffle([x], _indices(start, lanes)))


def constant_vector(values, dtype: str = "float32"):
    """A vector of immediate values, kept by LLVM as one constant."""
    scalar = float if dtype.startswith("float") else int
    return tirx.Shuffle([tirx.const(scalar(value), dtype) for value in values], _indices(0, len(values)))


class TirOps:
    """The operations of ``tables.evaluate`` as TIR on vectors of ``lanes``; each result is bound to a name."""

    def __init__(self, lanes: int, isa: InstructionSet) -> None:
        self.lanes = lanes
        self.scales_by_powers = isa.name == "avx512" and lanes == 16
        self._float = with_lanes("float32", lanes)
        self._int = with_lanes("int32", lanes)
        self._look_up = LOOK_UPS[isa.name][1]

    def _fence(self, x):
        # TVM's simplifier makes x of (x + magic) - magic, as if floats were exact; it does not look into calls.
        return tirx.call_llvm_intrin(self._float, "llvm.arithmetic.fence", x)

    def const(self, value: float):
        return tirx.const(float(np.float32(value)), self._float)

    def int_const(self, value: int):
        return tirx.const(value, self._int)

    def add(self, a, b):
        return bind(self._fence(add(a, b)))

    def sub(self, a, b):
        return bind(self._fence(sub(a, b)))

    def mul(self, a, b):
        return bind(mul(a, b))

    def add_on_multipliers(self, a, b):
        """a + b, as a * 1 + b: the same bits from the units that multiply, where those that add are the busier ones."""
        if not self.scales_by_powers:
            return self.add(a, b)
        one, rounding = tirx.const(1.0, self._float), tirx.const(4, "int32")
        return bind(tirx.call_llvm_intrin(self._float, "llvm.x86.avx512.vfmadd.ps.512", a, one, b, rounding))

    def divide(self, a, b):
        return bind(a / b)

    def sqrt(self, x):
        return bind(tirx.sqrt(x))

    def minimum(self, a, b):
        return bind(tirx.Select(a < b, a, b))

    def maximum(self, a, b):
        return bind(tirx.Select(a > b, a, b))

    def rint(self, x):
        """The nearest integer, ties to even: vrndscaleps."""
        return bind(_masked_avx512("rndscale", x, tirx.const(8, "int32")))

    def fraction(self, x):
        """x - rint(x), which is exact; 0 for infinities: vreduceps."""
        return bind(_masked_avx512("reduce", x, tirx.const(8, "int32")))

    def scale(self, x, power):
        """x * 2**power, rounded once; right for infinities and denormals: vscalefps."""
        return bind(_masked_avx512("scalef", x, power))

    def absolute(self, x):
        return bind(tirx.abs(x))

    def less(self, a, b):
        return a < b

    def select(self, condition, a, b):
        return bind(tirx.Select(condition, a, b))

    def bits(self, x):
        return bind(tirx.reinterpret(self._int, x))

    def from_bits(self, bits):
        return bind(tirx.reinterpret(self._float, bits))

    def to_float(self, integer):
        return bind(integer.astype(self._float))

    def keep(self, value):
        return keep(value)

    def wide(self, integer):
        wide = bind(integer).astype(with_lanes("int64", self.lanes))
        return bind(wide & self.wide_const(0xFFFFFFFF))

    def wide_const(self, value: int):
        return tirx.const(value, with_lanes("int64", self.lanes))

    def narrow(self, wide):
        return bind(bind(wide).astype(self._int))

    def lookup(self, coefficients, index):
        return [bind(value) for value in self._look_up(coefficients, bind(index), self.lanes)]


def _masked_avx512(name: str, *arguments):
    """An AVX-512 instruction on all 16 lanes, rounding as the machine is set."""
    mask, rounding = tirx.const(-1, "int16"), tirx.const(4, "int32")
    unused = tirx.const(0.0, "float32x16")
    return tirx.call_llvm_intrin(
        "float32x16", f"llvm.x86.avx512.mask.{name}.ps.512", *arguments, unused, mask, rounding
    )


def _permute_avx2(coefficients, index, lanes: int):
    """vpermps reads the low three bits of each index; higher bits choose among several permutations."""

    def permute(values):
        return tirx.call_llvm_intrin("float32x8", "llvm.x86.avx2.permps", constant_vector(values), index)

    return _select_blocks(coefficients, index, lanes, 8, permute)


def _permute_avx512(coefficients, index, lanes: int):
    """vpermps on 16 lanes reads the low four bits; 8 coefficients stand there twice."""

    def permute(values):
        return tirx.call_llvm_intrin(
            "float32x16", "llvm.x86.avx512.permvar.sf.512", constant_vector(values), index
        )

    repeated = [values * max(1, 16 // len(values)) for values in coefficients]
    return _select_blocks(repeated, index, lanes, 16, permute)


def _table_neon(coefficients, index, lanes: int):
    """tbl looks up bytes: lane index i becomes the bytes 4i, 4i + 1, 4i + 2, 4i + 3 of a table of 8 or 16 floats."""
    cells = len(coefficients[0])
    block = min(cells, 16)
    registers = block // 4
    cell = index & tirx.const(block - 1, "int32x4")
    bytes_of_lane = bind(cell * tirx.const(0x04040404, "int32x4") + tirx.const(0x03020100, "int32x4"))
    places = bind(tirx.reinterpret("uint8x16", bytes_of_lane))

    def look_up(values):
        words = np.asarray(values, np.float32).view(np.uint8).reshape(registers, 16)
        found = tirx.call_llvm_intrin(
            "uint8x16",
            f"llvm.aarch64.neon.tbl{registers}",
            *(constant_vector(word, "uint8") for word in words),
            places,
        )
        return tirx.reinterpret("float32x4", found)

    return _select_blocks(coefficients, index, lanes, block, look_up)


def _select_blocks(coefficients, index, lanes: int, block: int, permute: Callable):
    """Look up each block of the table, then choose the block by the index bits above those of a block."""
    zero = tirx.const(0, with_lanes("int32", lanes))
    found = []
    for values in coefficients:
        parts = [bind(permute(values[i : i + block])) for i in range(0, len(values), block)]
        bit = block
        while len(parts) > 1:
            chosen = (index & tirx.const(bit, with_lanes("int32", lanes))) != zero
            parts = [
                bind(tirx.Select(chosen, odd, even))
                for even, odd in zip(parts[::2], parts[1::2], strict=True)
            ]
            bit *= 2
        found.append(parts[0])
    return found


def _select_bits(coefficients, index, lanes: int):
    """Any machine: a binary tree of bitwise selections, one index bit a level."""
    dtype = with_lanes("int32", lanes)

    def const(value: int):
        return tirx.const(int(value), dtype)

    levels = len(coefficients[0]).bit_length() - 1
    # All ones in the lanes whose index has the level's bit.
    masks = [bind((index << const(31 - level)) >> const(31)) for level in range(levels)]
    found = []
    for values in coefficients:
        words = np.asarray(values, np.float32).view(np.int32)
        parts = [
            bind(const(a) ^ (masks[0] & const(a ^ b))) for a, b in zip(words[::2], words[1::2], strict=True)
        ]
        for mask in masks[1:]:
            parts = [bind(a ^ (mask & (a ^ b))) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        found.append(tirx.reinterpret(with_lanes("float32", lanes), parts[0]))
    return found


LOOK_UPS: dict[str, tuple[int, Callable]] = {
    "avx512": (16, _permute_avx512),
    "avx2": (8, _permute_avx2),
    "neon": (4, _table_neon),
    "sse2": (1, _select_bits),
    "generic": (1, _select_bits),
    "cuda": (1, look_up),
}
"""By instruction set: the lanes that a look-up works on (1: any), and the look-up."""
