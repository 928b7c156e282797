"""AMX: registers that hold tiles of up to 16 rows of 64 bytes, and products of them.

Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18. ``tdpbf16ps`` takes bfloat16, whose
eight bits hold every grid value, and adds to float32; ``tdpbssd`` and ``tdpbusd`` take bytes and add to int32.

Linux gives a process the registers when it asks (``arch_prctl``, Documentation/arch/x86/xstate.rst). So each kernel
brings LLVM code that asks once; the copies of all kernels of a module are merged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.prim_func import store

ROWS = 16
"""Most rows of a tile: of activations, and lanes of one of its rows of sums."""

ROW_BYTES = 64
SUMS = 4
"""Tile registers that hold sums; the other four hold operands."""

_ASK = """
@qfp8_tiles_granted = linkonce_odr hidden global i32 0
declare i64 @syscall(i64, i64, i64)
define linkonce_odr hidden i32 @qfp8_ask_for_tiles() {
  %seen = load atomic i32, ptr @qfp8_tiles_granted monotonic, align 4
  %granted = icmp ne i32 %seen, 0
  br i1 %granted, label %done, label %ask
ask:
  ; arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
  %answer = call i64 @syscall(i64 158, i64 4131, i64 18)
  %given = icmp eq i64 %answer, 0
  br i1 %given, label %keep, label %refused
keep:
  store atomic i32 1, ptr @qfp8_tiles_granted monotonic, align 4
  br label %done
done:
  ret i32 0
refused:
  ret i32 1
}
"""


@dataclass(frozen=True)
class TileKind:
    """What a product of tiles takes."""

    name: str
    instruction: str
    element_bytes: int
    pair: int
    """Neighbouring reduction steps that lie together in a tile of weights: four bytes of them."""
    sums: str

    @property
    def most(self) -> int:
        """Most reduction steps of one product."""
        return ROW_BYTES // self.element_bytes

    @property
    def dtype(self) -> str:
        """What operands are kept as; bfloat16 as its bits."""
        return "uint16" if self.element_bytes == 2 else "int8"


BFLOAT16 = TileKind("bf16", "tdpbf16ps", 2, 2, "float32")
SIGNED = TileKind("int8", "tdpbssd", 1, 4, "int32")
UNSIGNED = TileKind("uint8", "tdpbusd", 1, 4, "int32")
"""Activations of 0 to 255."""


def _emit(name: str, *arguments) -> None:
    values = [tirx.const(a, "int8") if isinstance(a, int) else a for a in arguments]
    T.evaluate(tirx.call_llvm_intrin("void", f"llvm.x86.{name}", *values))


def tile_buffer(size: int, dtype: str):
    """Scratch for tiles. TVM cuts a buffer to what its own loads and stores reach, and a tile's are none of them."""
    buffer = T.alloc_buffer((size,), dtype, align=64)
    store(buffer, size - 1, tirx.const(0, dtype), 1)
    return buffer


def with_tiles(body: Callable[[], None]) -> None:
    """A kernel's ``body``, with the code that asks Linux for the registers."""
    with T.attr(0, "pragma_import_llvm", _ASK):
        refused = tirx.call_extern("int32", "qfp8_ask_for_tiles")
        with T.Assert(
            refused == 0, "this system does not let the process use the CPU's tile registers (AMX)"
        ):
            body()


@dataclass(frozen=True)
class TileRegisters:
    """Sums of ``row_tiles x column_tiles`` tiles (at most four), each of ``rows`` rows and 16 columns."""

    kind: TileKind
    rows: int
    row_tiles: int
    column_tiles: int
    steps: int
    """Reduction steps of one product, a multiple of the kind's ``pair``."""

    def _configure(self) -> None:
        by_rows = self.row_tiles <= self.column_tiles
        few = min(self.row_tiles, self.column_tiles)
        of_rows = (self.rows, self.steps * self.kind.element_bytes)
        of_columns = (self.steps // self.kind.pair, ROW_BYTES)
        held, passing = (of_rows, of_columns) if by_rows else (of_columns, of_rows)
        shapes = [(self.rows, ROW_BYTES)] * SUMS + [held] * few + [passing] * (SUMS - few)
        config = T.alloc_buffer((8,), "int64", scope="local")
        image = bytearray(64)
        image[0] = 1
        for register, (rows, row_bytes) in enumerate(shapes):
            image[16 + 2 * register : 18 + 2 * register] = row_bytes.to_bytes(2, "little")
            image[48 + register] = rows
        for word in range(8):
            value = int.from_bytes(image[8 * word : 8 * word + 8], "little", signed=True)
            store(config, word, tirx.const(value, "int64"), 1)
        _emit("ldtilecfg", tirx.address_of(config[0]))

    def share(self, count: int, workers: int, body: Callable) -> None:
        """``body(first, count)`` for parts of ``count`` indices, one a worker, each with the registers set up.

        No part is empty.
        """

        def part(first, number) -> None:
            self._configure()
            body(first, number)
            _emit("tilerelease")

        workers = min(workers, count)
        if workers == 1:
            part(0, count)
            return
        with T.parallel(0, workers) as worker:
            first = T.bind(worker * count // workers)
            part(first, T.bind((worker + 1) * count // workers - first))

    def clear(self) -> None:
        """Make all sums zero."""
        for register in range(self.row_tiles * self.column_tiles):
            _emit("tilezero", register)

    def multiply(self, rows: Callable, columns: Callable) -> None:
        """Add one product; ``rows(tile)`` and ``columns(tile)`` are (buffer, index, elements from row to row)."""
        by_rows = self.row_tiles <= self.column_tiles
        held, few = (rows, self.row_tiles) if by_rows else (columns, self.column_tiles)
        passing, many = (columns, self.column_tiles) if by_rows else (rows, self.row_tiles)
        for i in range(few):
            self._load(SUMS + i, *held(i))
        for j in range(many):
            register = SUMS + few + j % (SUMS - few)
            self._load(register, *passing(j))
            for i in range(few):
                row, column = (i, j) if by_rows else (j, i)
                a, b = (SUMS + i, register) if by_rows else (register, SUMS + i)
                _emit(self.kind.instruction, row * self.column_tiles + column, a, b)

    def _load(self, register: int, buffer, index, stride) -> None:
        stride_bytes = stride * self.kind.element_bytes
        _emit("tileloadd64", register, tirx.address_of(buffer[index]), tirx.const(stride_bytes, "int64"))

    @property
    def all_rows(self) -> int:
        return self.rows * self.row_tiles

    @property
    def width(self) -> int:
        return ROWS * self.column_tiles

    def write(self, buffer, start) -> None:
        """Store all sums into ``buffer`` from ``start``, ``(all_rows, width)`` of the kind's ``sums``."""
        for row in range(self.row_tiles):
            for column in range(self.column_tiles):
                at = start + (row * self.rows * self.width + column * ROWS)
                stride = tirx.const(4 * self.width, "int64")
                _emit("tilestored64", row * self.column_tiles + column, tirx.address_of(buffer[at]), stride)
