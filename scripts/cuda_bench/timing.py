"""Times of calls on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any


def seconds(torch: Any, contestants: dict[str, Callable[[int], object]], turns: int, calls: int = 64) -> dict:
    """Seconds of one call of each contestant, a list of one figure a turn; contestants get a running number.

    Calls are captured as a graph, so that what a CPU needs to launch them is not what is timed.
    """
    import tvm_ffi

    graphs = {}
    for name, call in contestants.items():
        call(0)  # loads its kernels
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with tvm_ffi.use_torch_stream(torch.cuda.graph(graphs[name])):
            for index in range(calls):
                call(index)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(turns + 2):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 2:  # the first ones warm up
                times[name].append(start.elapsed_time(end) / 1e3 / calls)
    return times


def figures(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of seconds, and how many times as fast as each other contestant ours are."""
    found: dict[str, Any] = {"seconds": {name: statistics.median(values) for name, values in times.items()}}
    for name, values in times.items():
        if name != "ours":
            ratios = [other / own for other, own in zip(values, times["ours"], strict=True)]
            found[f"times_{name}"] = statistics.median(ratios)
    return found
