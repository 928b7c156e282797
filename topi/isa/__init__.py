"""Instruction sets: vector width, micro-kernel tile and the multiply-add of each.

A micro-kernel is written once (``topi/micro_kernel.py``); an instruction set says how many int32 lanes a vector
has, how many reduction steps one multiply-add takes (``pair``: two on x86, where ``vpmaddwd`` adds the products
of neighbouring int16 lanes), how large the register tile is, and emits the multiply-add itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from tvm_qfp8.format import Layout
from tvm_qfp8.topi.split import Split, split_of

SPILLED = 1.02
"""What a tile costs, in times, whose epilogue has to move accumulators to memory and back."""


FUSED = frozenset({"fma", "vfp4", "fp-armv8", "f"})
"""Features that bring a fused multiply-add: of x86, Armv7, Armv8 and RISC-V."""


IN_ORDER = frozenset({"a35", "a53"})
"""Arm CPUs that run in order, where the three dependent instructions of ``neon_mull`` take longer than they save."""


TILES = frozenset({"avx512vbmi", "amx-tile", "amx-int8", "amx-bf16"})
"""Features of CPUs whose tile registers the kernels use; those that have them look up bytes, too."""


PREFETCHES_WELL = "clzero"
"""A feature of AMD's Zen alone. On Zen 4 weights that are read once come slower if they are also asked for."""


@dataclass(frozen=True)
class InstructionSet:
    """What a kernel generator needs to know of a target."""

    name: str
    lanes: int
    """int32 or float32 lanes of one vector register."""
    pair: int
    """Products that one multiply-add sums into each int32 lane."""
    registers: int
    """Vector registers."""
    multiply_add: Callable
    """(acc int32xL, a, b) -> int32xL; a holds one group of ``pair`` values in each lane, b is int16x(L*pair)."""
    broadcast: Callable
    """(buffer int16, index) -> the ``pair`` values at index, repeated in every lane."""
    spare: int = 0
    """Registers that the accumulators of a dense layer had better leave, for its epilogue."""
    temporaries: int = 0
    """Registers that one multiply-add needs besides its operands: 1 where multiplying and adding are two steps."""
    row_steps: int = 1
    """Reduction steps whose activations one vector load brings, where multiply-adds take them from its lanes."""
    element: Callable | None = None
    """(row vector, step) -> its activations of that step, repeated in every lane; where ``row_steps`` > 1."""
    byte_permute: bool = False
    """Has ``vpermi2b``, a look-up in a table of 128 bytes (AVX512-VBMI)."""
    row_group: int = 1
    """Rows that one multiply-add takes: 2 where it multiplies matrices, see ``topi/matrix_kernel.py``."""
    byte_products: InstructionSet | None = None
    """The same machine's multiply-add of int8 values, where it does so many more that split values pay."""
    matrix_products: InstructionSet | None = None
    """The same for matrices of int8 values; for dense layers, whose rows can be interleaved."""
    extension: str = ""
    """What tells a multiply-add of bytes from those of ``name``."""
    unsigned_activations: bool = False
    """A multiply-add of bytes takes activations of 0 to 255, weights of -128 to 127 (``vpdpbusd``)."""
    one_product: bool = False
    """A multiply-add of bytes takes only twice as many as of int16 values, so that splitting values does not pay."""
    multiplications: int = 1
    """Instructions of one multiply-add that multiply."""
    halved_pairs: bool = False
    """A vector of weights holds the first half of each ``pair``, then the second."""
    tiles: bool = False
    """Multiplies matrices in tile registers, see ``topi/amx``."""
    asks_ahead: bool = True
    """Asks for weights before it reads them, see ``panels.fetch_stream``."""
    float16: bool = False
    """Converts between float16 and float32."""
    fused: bool = True
    """Has a fused float32 multiply-add."""
    operand: str = "int16"
    """What operands that are not split are kept as: grid values, or float32 (``floats.py``)."""
    split: Split | None = None
    """The int8 parts that this multiply-add takes; None where it takes int16 grid values."""

    @property
    def label(self) -> str:
        """``name`` with its extension."""
        return f"{self.name}+{self.extension}" if self.extension else self.name

    @property
    def operand_dtype(self) -> str:
        """What decoded operands are kept as."""
        return "int8" if self.split else self.operand

    @property
    def accumulator_dtype(self) -> str:
        """What sums are kept as."""
        return "float32" if self.operand == "float32" else "int32"

    @property
    def products(self) -> int:
        """Passes over the operands: the byte products that make one product of grid values."""
        return self.split.products if self.split else 1

    @property
    def rate(self) -> float:
        """Products of grid values, or of float32 ones, that an instruction which multiplies makes."""
        return self.lanes * self.pair / (self.products * self.multiplications)

    @property
    def weights_in_place(self) -> bool:
        """Stored weights are the bytes to multiply."""
        return self.split is not None and self.split.weights_ready

    @property
    def operand_bytes(self) -> int:
        """Bytes of one decoded activation."""
        return self.activation_parts if self.split else 4 if self.operand == "float32" else 2

    @property
    def activation_parts(self) -> int:
        """Forms in which each decoded activation is kept."""
        return len(self.split.activation_parts) if self.split else 1

    def activation_part(self, product: int) -> int:
        """Which of those forms a product takes."""
        return self.split.activation_part(product) if self.split else 0

    @property
    def vectors_at_once(self) -> int:
        """Vectors that elementwise and row kernels read before they write any, see ``stores_last``: they are held."""
        return 8 if self.registers >= 32 else 2

    def in_bytes(self, activation: Layout, weight: Layout, dense: bool) -> InstructionSet:
        """The variant that multiplies the int8 parts of these layouts; itself where there is none."""
        variant = (dense and self.matrix_products) or self.byte_products
        split = variant and split_of(activation, weight, variant.unsigned_activations, variant.one_product)
        return replace(variant, split=split) if variant and split else self

    def takes(self, activation: Layout | None) -> bool:
        """Whether activations are multiplied as they are stored: float32, or codes that are the bytes to multiply."""
        return activation is None or (self.split is not None and self.split.takes_codes(activation))

    def fits(self, rows: int, vectors: int) -> bool:
        """Whether accumulators, the weight vectors of one step and the activations fit the registers."""
        weights = vectors * self.row_group
        activations = rows / self.row_group if self.row_steps > 1 or self.row_group > 1 else 1
        return rows * vectors + weights + activations + self.temporaries <= self.registers

    def tile(
        self, rows: int, columns: int, row_length: int | None = None, weight_load: float = 0.0
    ) -> tuple[int, int]:
        """(rows, vectors) of the register tile for an output of ``rows`` x ``columns``.

        ``row_length`` is given where a tile may not cross a row of pixels (convolution), ``weight_load`` where a vector
        of weights does not come from the nearest cache: the multiply-adds that its load takes the time of.
        """
        best, best_cost = (self.row_group, 1), float("inf")
        length = row_length or rows
        for vectors in (1, 2, 3, 4):
            if vectors > 1 and (vectors - 1) * self.lanes >= columns:
                break
            for tile_rows in range(self.row_group, min(length, 14) + 1, self.row_group):
                if not self.fits(tile_rows, vectors):
                    continue
                steps = -(-length // tile_rows) * -(-columns // (vectors * self.lanes))
                # One multiply-add each, plus the loads of a step: vectors of weights, and the activations.
                loads = vectors * self.row_group + tile_rows / (self.row_steps * self.row_group)
                multiply_adds = tile_rows * vectors
                waiting = 0.5 * max(loads - multiply_adds / 2, 0) + weight_load * vectors
                cost = steps * (multiply_adds + waiting + 1.5)
                if row_length is None and tile_rows * vectors > self.registers - self.spare:
                    cost *= SPILLED
                if cost < best_cost:
                    best, best_cost = (tile_rows, vectors), cost
        return best


def instruction_set(name: str, features: Collection[str] = ()) -> InstructionSet:
    """The instruction set called ``avx512``, ``avx2``, ``sse2``, ``neon``, ``generic`` or ``cuda``.

    ``features`` are LLVM's names of the target's features, or a GPU's architecture; some widen what an instruction set
    can do.
    """
    from tvm_qfp8.topi.isa import (
        avx2,
        avx2_vnni,
        avx512,
        avx512_vnni,
        neon,
        neon_dotprod,
        neon_i8mm,
        neon_mull,
        sse2,
    )

    if name == "cuda":
        from tvm_qfp8.topi.cuda import isa as cuda

        return cuda.HOPPER if "sm_90a" in features else cuda.INSTRUCTION_SET
    if name == "generic":
        # The same plain vector code, without the look-up instructions that "neon" stands for.
        return replace(
            neon.INSTRUCTION_SET, name="generic", float16=False, fused=not FUSED.isdisjoint(features)
        )
    if name == "neon" and "dotprod" in features:
        return replace(
            neon.INSTRUCTION_SET,
            byte_products=neon_dotprod.INSTRUCTION_SET,
            matrix_products=neon_i8mm.INSTRUCTION_SET if "i8mm" in features else None,
        )
    if name == "neon":
        return replace(
            neon.INSTRUCTION_SET,
            byte_products=neon_mull.INSTRUCTION_SET if IN_ORDER.isdisjoint(features) else None,
        )
    sets = {"avx512": avx512, "avx2": avx2, "sse2": sse2}
    asks_ahead = PREFETCHES_WELL not in features
    found = replace(
        sets[name].INSTRUCTION_SET,
        asks_ahead=asks_ahead,
        byte_permute="avx512vbmi" in features,
        tiles=set(features) >= TILES,
        float16="f16c" in features,
        fused=not FUSED.isdisjoint(features),
    )
    byte_products = None
    if name == "avx512" and "avx512vnni" in features:
        byte_products = avx512_vnni.INSTRUCTION_SET
    elif name == "avx2" and "avxvnni" in features:
        byte_products = avx2_vnni.INSTRUCTION_SET
    return replace(found, byte_products=byte_products and replace(byte_products, asks_ahead=asks_ahead))
