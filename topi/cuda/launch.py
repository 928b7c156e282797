"""One thread for each element of an output."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

THREADS = 256


def for_each(count: int, body: Callable) -> None:
    """``body(index)`` in a thread of its own for each index; threads left over repeat the last one."""
    with T.launch_thread("blockIdx.x", -(-count // THREADS)) as block:
        with T.launch_thread("threadIdx.x", THREADS) as thread:
            body(T.bind(tirx.min(block * THREADS + thread, tirx.const(count - 1, "int32"))))
