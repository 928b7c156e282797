"""One thread for each element of an output."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

THREADS = 256
MANY_BLOCKS = 128
"""About as many as a large GPU has multiprocessors."""

BUSY = 2**20
"""Elements from which on a large GPU has more threads than it can run at once."""


def for_each(count: int, body: Callable, together: int = 1) -> None:
    """``body(index)`` for each index, ``together`` of them by one thread; threads left over repeat the last one.

    What one thread takes together is independent, so that it waits for all its loads at once.
    """
    with T.launch_thread("blockIdx.x", -(-count // (THREADS * together))) as block:
        with T.launch_thread("threadIdx.x", THREADS) as thread:
            for part in range(together):
                at = block * (THREADS * together) + part * THREADS + thread
                body(T.bind(tirx.min(at, tirx.const(count - 1, "int32"))))
