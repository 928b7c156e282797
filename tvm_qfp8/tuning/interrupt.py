"""Ctrl-C during a tuning run: the batch in hand is finished and logged, then the run ends.

TVM turns a KeyboardInterrupt that crosses its C++ code into a RuntimeError, and Ctrl-C reaches worker processes too,
whose candidates would then count as failed. So the signal is blocked, which workers inherit, and looked for between
batches.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C only makes the yielded function true. Outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    seen = threading.Event()
    handler = signal.signal(signal.SIGINT, lambda *_: seen.set())
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def interrupted() -> bool:
        if signal.SIGINT in signal.sigpending():
            signal.sigwait({signal.SIGINT})
            seen.set()
        return seen.is_set()

    try:
        yield interrupted
    finally:
        interrupted()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
