"""Builds a PrimFunc from explicit loops, and the vector loads and stores that all kernels share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.float_contract import (
    BFLOAT16_WORDS,
    bind,
    dtype_of,
    from_bfloat16,
    lanes_of,
    with_lanes,
)


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one kernel argument; scalars in the shape are ints (static)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        size = 1
        for extent in self.shape:
            size *= extent
        return size


def build_prim_func(name: str, arguments: Sequence[TensorSpec], body: Callable) -> tirx.PrimFunc:
    """A PrimFunc ``name`` whose body is emitted by ``body(*flat_buffers)``; every argument is seen as 1-D."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            buffers = [T.arg(f"p{i}", T.buffer(spec.shape, spec.dtype)) for i, spec in enumerate(arguments)]
            # Generated CUDA calls its arguments by these names.
            flat = [
                IRBuilder.name(f"p{i}", T.decl_buffer((spec.size,), spec.dtype, data=buffer.data))
                for i, (spec, buffer) in enumerate(zip(arguments, buffers, strict=True))
            ]
            body(*flat)
    return builder.get()


def load(buffer, index, lanes: int):
    """``lanes`` neighbouring elements from ``index``."""
    return buffer.vload([index], with_lanes(str(buffer.dtype), lanes))


def load_float(buffer, index, lanes: int):
    """As ``load``, of a buffer of float16 or bfloat16 as float32."""
    value = load(buffer, index, lanes)
    if str(buffer.dtype) == BFLOAT16_WORDS:
        return from_bfloat16(value)
    return value.astype(with_lanes("float32", lanes)) if str(buffer.dtype) == "float16" else value


def keep(value):
    """Name a value by way of memory, which LLVM takes out again.

    TVM's simplifier looks through names, in exponential time on long chains, but not into memory.
    """
    lanes = lanes_of(value)
    place = T.alloc_buffer((lanes,), dtype_of(value).partition("x")[0], scope="local", align=64)
    store(place, 0, value, lanes)
    return bind(load(place, 0, lanes))


_HELD: ContextVar[list[tuple] | None] = ContextVar("held", default=None)


@contextmanager
def stores_last() -> Iterator[None]:
    """Stores emitted inside come after all else that is, but those to registers. No loop may be emitted inside.

    A processor takes a load for one of what was just stored if the low 12 bits of their addresses agree, and waits.
    Buffers often lie so that each vector's store stands before the next one's load in this way.
    """
    held: list[tuple] = []
    token = _HELD.set(held)
    try:
        yield
    finally:
        _HELD.reset(token)
    for arguments in held:
        store(*arguments)


def store(buffer, index, value, lanes: int) -> None:
    """Write ``lanes`` neighbouring elements at ``index``."""
    held = _HELD.get()
    if held is not None and buffer.scope() != "local":
        held.append((buffer, index, bind(value), lanes))
        return
    T.buffer_store(buffer, value, [index if lanes == 1 else tirx.Ramp(index, 1, lanes)])


CACHE_LINE = 64


def prefetch_run(buffer, start, length: int) -> None:
    """Ask for ``length`` elements of a buffer from ``start`` in the second-level cache; never faults."""
    step = CACHE_LINE // np.dtype(str(buffer.dtype)).itemsize

    def line(offset) -> None:
        address = tirx.address_of(buffer[start + offset])
        T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, 0, 2, 1))

    with T.serial(0, -(-length // step)) as index:
        line(index * step)


def vector_runs(length: int, lanes: int, emit: Callable) -> None:
    """Cover ``length`` elements by calls ``emit(offset, lanes)``.

    The last vector overlaps the one before it, so the same elements may be written twice with the same value:
    input and output of ``emit`` must not alias. A run shorter than a vector goes by powers of two.
    """
    if length >= lanes:
        full = length // lanes
        if full == 1:
            emit(0, lanes)
        else:
            with T.serial(0, full) as i:
                emit(i * lanes, lanes)
        if length % lanes:
            emit(length - lanes, lanes)
        return
    for offset, part in powers_of_two(length):
        emit(offset, part)


def powers_of_two(length: int) -> Iterator[tuple[int, int]]:
    """(offset, lanes) of vectors of falling size that cover ``length`` elements."""
    offset = 0
    while offset < length:
        lanes = 1 << ((length - offset).bit_length() - 1)
        yield offset, lanes
        offset += lanes
