"""Memory that a compiled module owns and fills once, and that its file does not hold.

A kernel may keep something that it derives from its constants, such as transformed filters. It lies in a zeroed
array of the module (``.bss``), which belongs to every virtual machine that runs the module. LLVM code that
TVM links into the module defines the array and says who fills it: a kernel that finds its part empty fills it,
others wait. A part is a state word, padded to 64 bytes, and the values.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

HEADER_BYTES = 64
FUNCTION = "qfp8_static_memory"

# States of a part: 0 empty, 1 being filled, 2 ready.
_LLVM = """
@{name} = internal global [{size} x i8] zeroinitializer, align 64
declare i32 @sched_yield()
define hidden ptr @{name}_values(i64 %offset) {{
  %start = add i64 %offset, {header}
  %values = getelementptr i8, ptr @{name}, i64 %start
  ret ptr %values
}}
define hidden i32 @{name}_begin(i64 %offset) {{
  %state = getelementptr i8, ptr @{name}, i64 %offset
  %seen = load atomic i32, ptr %state acquire, align 64
  %ready = icmp eq i32 %seen, 2
  br i1 %ready, label %done, label %claim
claim:
  %pair = cmpxchg ptr %state, i32 0, i32 1 acq_rel acquire
  %claimed = extractvalue {{ i32, i1 }} %pair, 1
  br i1 %claimed, label %fill, label %wait
wait:
  %now = load atomic i32, ptr %state acquire, align 64
  %over = icmp eq i32 %now, 2
  br i1 %over, label %done, label %pause
pause:
  %yielded = call i32 @sched_yield()
  br label %wait
fill:
  ret i32 1
done:
  ret i32 0
}}
define hidden i32 @{name}_end(i64 %offset) {{
  %state = getelementptr i8, ptr @{name}, i64 %offset
  store atomic i32 2, ptr %state release, align 64
  ret i32 0
}}
"""


@dataclass(frozen=True)
class Filler:
    """A function that fills one part from constants, and leaves 1 in its last argument, int32 ``(1,)``."""

    key: str
    """Equal for equal functions."""
    function: Callable[[], tirx.PrimFunc]
    arguments: tuple[np.ndarray, ...]


@dataclass
class StaticMemory:
    """Hands out the parts of a module's array."""

    size: int = 0
    """Bytes handed out, headers included."""
    fillers: list[Filler] = field(default_factory=list)
    """What fills the parts before the kernels that read them would."""

    offsets: dict[Hashable, int] = field(default_factory=dict)
    """Where the parts lie, by what makes them equal."""

    def part(self, key: Hashable, count: int, filler: Callable[[np.ndarray], Filler]) -> np.ndarray:
        """Offset, int64 ``(1,)``, of the part of ``count`` int16 values that ``key`` stands for.

        A new one is filled by ``filler(offset)``.
        """
        known = key in self.offsets
        offset = np.array([self.offsets.setdefault(key, self.size)], np.int64)
        if not known:
            self.size += HEADER_BYTES + -(-2 * count // 64) * 64
            self.fillers.append(filler(offset))
        return offset

    def function(self) -> tirx.PrimFunc:
        """The function that brings the array into the module; it is never called."""
        code = _LLVM.format(name=FUNCTION, size=self.size, header=HEADER_BYTES)
        with IRBuilder() as builder:
            with T.prim_func(s_tir=True):
                T.func_name(FUNCTION)
                # Without noalias TVM takes it that all pointers of all functions may alias: every loop is slow.
                T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "global_symbol": FUNCTION})
                with T.attr(0, "pragma_import_llvm", code):
                    # An attribute around nothing would be removed.
                    T.evaluate(_call("int32", "begin", tirx.const(0, "int64")))
        return builder.get()


def _call(result, name: str, offset):
    return tirx.call_extern(result, f"{FUNCTION}_{name}", offset)


def filled_once(offset, count: int, fill: Callable):
    """The part at ``offset``, an int64 expression, as ``count`` int16; ``fill(buffer)`` emits what fills it."""
    pointer = T.bind(_call(tvm.ir.PointerType(tvm.ir.PrimType("int16")), "values", offset))
    values = T.decl_buffer((count,), "int16", data=pointer)
    with T.If(_call("int32", "begin", offset) != 0):
        with T.Then():
            fill(values)
            T.evaluate(_call("int32", "end", offset))
    return values
