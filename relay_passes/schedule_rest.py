"""A loop schedule for the operators that no kernel of ours covers (data movement, comparisons, integer ops).

Runs after ``LegalizeOps``, on every PrimFunc without the attribute ``tirx.is_scheduled``: producers are inlined,
outer loops fused and run in parallel where the work is worth a parallel region, the innermost loop vectorised.
Transpositions of matrices have a kernel (``topi/transpose.py``), others go by tiles.
"""

from __future__ import annotations

import math

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import TensorLoad
from tvm.s_tir.dlight.analysis import normalize_prim_func
from tvm.s_tir.dlight.base import try_inline

from tvm_qfp8.topi.float_contract import mul
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.prim_func import TensorSpec
from tvm_qfp8.topi.rows import MIN_PARALLEL_ELEMENTS
from tvm_qfp8.topi.transpose import TransposeShape, can_transpose, transpose_prim_func

VECTOR = 16
LINES = 8
"""Of a tile of a transposition, read side by side; at some strides a cache holds no more of them."""
TURNS = 8
"""Of a parallel loop, at least, for each thread: shares differ by an eighth at most."""


@tvm.transform.module_pass(opt_level=0, name="ScheduleRest")
class ScheduleRest:
    """Schedule what is left, and keep its float products uncontracted."""

    def __init__(self, isa: InstructionSet, threads: int) -> None:
        self.isa, self.threads = isa, threads

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        for var, function in list(mod.functions_items()):
            if isinstance(function, tirx.PrimFunc) and not (
                function.attrs and "tirx.is_scheduled" in function.attrs
            ):
                kernel = _transposition(function, self.isa, self.threads)
                if kernel is None:
                    kernel = fence_products(schedule(function, self.threads))
                mod[var] = kernel.with_attr("tirx.is_scheduled", True)
        return mod


def fence_products(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Every float32 product through the fence, see ``topi.float_contract``."""

    def fence(node):
        return mul(node.a, node.b) if str(node.ty.dtype).startswith("float32") else node

    return tvm_ffi.structural_map(function, (tirx.Mul, fence))


def schedule(function: tirx.PrimFunc, threads: int) -> tirx.PrimFunc:
    """The scheduled function; one that the scheduler cannot normalise is returned as it is."""
    sch = s_tir.Schedule(function)
    blocks = normalize_prim_func(sch)
    if blocks is None:
        return function
    for info in try_inline(sch, blocks):
        block = info.block_rv
        loops = sch.get_loops(block)
        if any(_extent(sch, loop) == 0 for loop in loops):
            continue
        kinds = info.dom_kind()
        spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == "S"]
        if len(spatial) != len(loops):
            reduction = [loop for loop, kind in zip(loops, kinds, strict=True) if kind != "S"]
            if spatial:
                sch.reorder(*spatial, *reduction)
            _parallel(sch, spatial, threads, math.prod(_extent(sch, loop) or LINES for loop in reduction))
            continue
        if not spatial:
            continue
        places = _places(sch.get(block))
        if places is not None and places[-1] < len(spatial) - 1:
            inside = VECTOR * (_extent(sch, spatial[-1]) or LINES)
            _parallel(sch, _tile(sch, spatial, places[-1]), threads, inside)
            continue
        inside, extent = 1, _extent(sch, spatial[-1])
        if extent is not None and extent >= VECTOR and extent % VECTOR == 0:
            outer, inner = sch.split(spatial[-1], [None, VECTOR])
            sch.vectorize(inner)
            spatial, inside = [*spatial[:-1], outer], VECTOR
        elif extent is not None and 1 < extent <= VECTOR and extent & (extent - 1) == 0:
            sch.vectorize(spatial[-1])
            spatial, inside = spatial[:-1], extent
        _parallel(sch, spatial, threads, inside)
    return sch.mod["main"]


def _transposition(function: tirx.PrimFunc, isa: InstructionSet, threads: int) -> tirx.PrimFunc | None:
    """The kernel of a function that transposes matrices, and does nothing else; None if tiles do not suit it."""
    if len(function.params) != 2:
        return None
    sch = s_tir.Schedule(function)
    blocks = sch.get_child_blocks(sch.get_sblock("root")) if normalize_prim_func(sch) is not None else []
    if len(blocks) != 1:
        return None
    block = sch.get(blocks[0])
    places = _places(block)
    if places is None:
        return None
    buffers = block.body.value.source, block.body.buffer
    if any(not isinstance(extent, tirx.IntImm) for buffer in buffers for extent in buffer.shape):
        return None
    x, y = (TensorSpec(tuple(map(int, buffer.shape)), str(buffer.dtype)) for buffer in buffers)
    # Loops over axes of one place are gone.
    shape = TransposeShape.of(
        tuple(n for n in x.shape if n != 1), tuple(map(places.index, range(len(places))))
    )
    if shape is None or not can_transpose(isa, shape, x.dtype):
        return None
    return transpose_prim_func(isa, threads, shape, x, y)


def _places(block: s_tir.SBlock) -> list[int] | None:
    """Of a transposition the axes of its output where those of its input are; else None."""
    store = block.body
    load = getattr(store, "value", None)
    if not isinstance(store, tirx.BufferStore) or not isinstance(load, TensorLoad):
        return None
    axes = [iterator.var for iterator in block.iter_vars]
    written, read = ([i for i in x.indices if not isinstance(i, tirx.IntImm)] for x in (store, load))
    if len(read) != len(axes) or not all(x.same_as(y) for x, y in zip(written, axes, strict=False)):
        return None
    found = [p for index in read for p, axis in enumerate(axes) if axis.same_as(index)]
    return found if len(found) == len(set(found)) == len(axes) else None


def _tile(sch: s_tir.Schedule, loops: list, contiguous: int) -> list:
    """Tiles of lines that stay in the first cache, read along the one and written along the other axis.

    Row by row each value of a large transposition would be read from a line of its own. The loops outside of tiles.
    """
    extent = _extent(sch, loops[-1]) or 0
    columns, column = sch.split(loops[-1], [None, LINES])
    rows, row = sch.split(loops[contiguous], [None, VECTOR])
    outer = [loop for i, loop in enumerate(loops[:-1]) if i != contiguous]
    sch.reorder(*outer, rows, columns, row, column)
    if extent % LINES == 0:
        sch.vectorize(column)
    return [*outer, rows]


def _extent(sch: s_tir.Schedule, loop) -> int | None:
    extent = sch.get(loop).extent
    return int(extent) if isinstance(extent, tirx.IntImm) else None


def _parallel(sch: s_tir.Schedule, loops: list, threads: int, inside: int) -> None:
    """Loops around work on ``inside`` elements."""
    extents = [_extent(sch, loop) or MIN_PARALLEL_ELEMENTS for loop in loops]
    if not loops or threads == 1 or inside * math.prod(extents) < MIN_PARALLEL_ELEMENTS:
        return
    # No more of them than give turns enough: each turn divides its number into their indices.
    outer = next(
        (n for n in range(1, len(loops)) if math.prod(extents[:n]) >= TURNS * threads),
        len(loops),
    )
    sch.parallel(sch.fuse(*loops[:outer]))
