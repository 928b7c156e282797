"""Times compiled nonlinear layers against torch, onnxruntime and TVM's FastMathTransform, one thread.

Contestants take turns on the same data in one process; every figure is the median over the turns, and every ratio the
median of the turns' ratios, so that what slows the machine slows all. ``copy`` is NumPy's copy of the same array.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["TVM_NUM_THREADS"] = "1"

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
SIZES = (1 << 14, 1 << 20)
MAX_ERRORS = (1e-3, 1e-4)
TARGETS = ("native", "x86-64-v3")
TURN_SECONDS = 0.004
PEERS = ("torch", "onnxruntime")


def main() -> None:
    from zoo.function_bars import bars
    from zoo.machine import describe_machine
    from zoo.nonlinear import LAYERS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--functions", default=",".join(LAYERS))
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "results" / "bench_functions.json")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.functions.split(","):
        for size in SIZES:
            print(f"{name}, {size} values", file=sys.stderr)
            rows.append({"function": name, "size": size, **measure(LAYERS[name], size, arguments.turns)})
    checked = [bar._asdict() for row in rows for bar in bars(row)]
    record = {"machine": describe_machine(), "turns": arguments.turns, "rows": rows, "bars": checked}
    print_tables(record)
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {arguments.output}")


def measure(layer: Any, size: int, turns: int) -> dict[str, Any]:
    """Gigaelements a second of every contestant and how many times as fast as each other one ours are."""
    from zoo.nonlinear import copy_runner, fast_math_runner, ours, runs_here

    x = (3.0 * np.random.default_rng(0).standard_normal(layer.shape(size))).astype(np.float32)
    contestants: dict[str, Callable[[], object]] = {"copy": copy_runner(x)}
    for peer, runner in layer.peers.items():
        contestants[peer] = runner(x)
    contestants["fast math"] = fast_math_runner(layer, x)
    forms = {}
    for target in filter(runs_here, TARGETS):
        for max_error in MAX_ERRORS:
            key = f"{target} {max_error:g}"
            contestants[key], forms[key] = ours(layer, x, target, max_error)
    seconds = take_turns(contestants, turns)
    others = [name for name in contestants if name not in forms]
    return {
        "forms": forms,
        "gigaelements": {name: round(size / statistics.median(t) / 1e9, 3) for name, t in seconds.items()},
        "speedup": {
            key: {
                o: round(statistics.median(a / b for a, b in zip(seconds[o], seconds[key], strict=True)), 3)
                for o in others
            }
            for key in forms
        },
    }


def take_turns(contestants: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Seconds a call: in each turn every contestant runs for some milliseconds, one after the other."""
    calls = {}
    for name, run in contestants.items():
        run()
        started = time.perf_counter()
        run()
        calls[name] = max(1, round(TURN_SECONDS / (time.perf_counter() - started)))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(turns):
        for name, run in contestants.items():
            started = time.perf_counter()
            for _ in range(calls[name]):
                run()
            seconds[name].append((time.perf_counter() - started) / calls[name])
    return seconds


def print_tables(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=160)
    names = list(dict.fromkeys(name for row in record["rows"] for name in row["gigaelements"]))
    table = Table("function", "size", *names, title="G values / s")
    for row in record["rows"]:
        found = (f"{row['gigaelements'].get(name, float('nan')):.2f}" for name in names)
        table.add_row(row["function"], str(row["size"]), *found)
    console.print(table)
    table = Table("bar", "measured", "limit", "kept")
    for bar in record["bars"]:
        table.add_row(bar["what"], f"{bar['measured']:.2f}", bar["limit"], "yes" if bar["kept"] else "NO")
    console.print(table)


if __name__ == "__main__":
    main()
