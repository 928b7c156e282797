"""Contestants of one process that take turns, timed by the processor time of the whole process.

With one thread that is the time of a call, but it does not count what other programs of a busy machine take.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from kernel_bench.ours import Run

SAMPLE_SECONDS = 0.004
"""A sample is as many calls as take about so long; a quarter of them run before it and do not count."""


def _seconds(run: Run, calls: int) -> float:
    started = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - started) / calls


def medians(runners: dict[str, Run], turns: int) -> dict[str, float]:
    """Median microseconds of a call of each."""
    calls = {}
    for name, run in runners.items():
        run()
        calls[name] = max(1, round(SAMPLE_SECONDS / _seconds(run, 3)))
    samples: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(turns):
        for name, run in runners.items():
            _seconds(run, max(1, calls[name] // 4))
            samples[name].append(_seconds(run, calls[name]))
    return {name: statistics.median(values) * 1e6 for name, values in samples.items()}


def reading_runner(size: int) -> Run:
    """Reads ``size`` bytes once, from first to last: NumPy adds them up as int64, faster than memory delivers."""
    return np.ones(size // 8, np.int64).sum
