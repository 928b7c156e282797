"""The cost of a table against its number of segments, within each form of look-up, and the forms side by side.

A form is how the coefficients of a cell are found: ``registers`` by in-register permutations, as the compiler does for
8, 16 and 32 cells; ``gather`` from memory, one gather a coefficient. The same function, GELU, is fitted with ever more
cells: its error falls, its cost within one form must not rise. Then, at the same error, the compiler's form stands
beside the smallest gathered tables: it is why the compiler does not gather. One thread; all take turns.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["TVM_NUM_THREADS"] = "1"

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from bench_functions import take_turns

from zoo.bars import Bar
from zoo.machine import describe_machine
from zoo.segments import TARGET, Entry, kernel, same_error, sweep

REPOSITORY = Path(__file__).resolve().parent.parent
SIZES = (1 << 14, 1 << 20)
CONSTANT = 1.1
NOISY = 1.15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "results" / "bench_segments.json")
    arguments = parser.parse_args()
    entries = [*sweep(), *same_error()]
    load_before = os.getloadavg()[0]
    rows, noise = [], 1.0
    for size in SIZES:
        seconds, copies = measure(entries, size, arguments.turns)
        noise = max(noise, spread(copies))
        rows += [
            {
                "form": entry.form,
                "function": entry.table.name,
                "degree": entry.table.degree,
                "segments": entry.segments,
                "bytes": entry.table.nbytes,
                "proved_error": entry.table.max_error,
                "size": size,
                "gigaelements": round(size / statistics.median(taken) / 1e9, 3),
                "share_of_copy": round(
                    statistics.median(c / t for c, t in zip(copies, taken, strict=True)), 3
                ),
                "seconds": taken,
            }
            for entry, taken in zip(entries, seconds, strict=True)
        ]
    checked, gathered = [bar._asdict() for bar in bars(rows)], verdict(rows)
    for row in rows:
        del row["seconds"]
    record: dict[str, Any] = {"machine": describe_machine(), "target": TARGET, "turns": arguments.turns}
    record |= {"load_before": round(load_before, 2), "copy_spread": round(noise, 3), "noisy": noise > NOISY}
    record |= {"gather": gathered, "rows": rows, "bars": checked}
    print_tables(record)
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {arguments.output}")
    if record["noisy"]:
        print(
            f"warning: the machine is noisy: the slow tenth of the copies took {noise:.2f} times the median "
            f"(load {load_before:.2f} at the start); run this again when nothing else does"
        )


def measure(entries: list[Entry], size: int, turns: int) -> tuple[list[list[float]], list[float]]:
    """Seconds a call of every entry and of a copy, turn by turn; a wrong result ends the run."""
    x = (3.0 * np.random.default_rng(0).standard_normal(size)).astype(np.float32)
    y, copied = tvm.runtime.tensor(np.zeros_like(x)), np.empty_like(x)
    contestants: dict[str, Callable[[], object]] = {"copy": lambda: np.copyto(copied, x)}
    for i, entry in enumerate(entries):
        run = kernel(entry, size)(x, y)
        run()
        if not np.array_equal(y.numpy(), entry.table(x)):
            raise SystemExit(f"error: {entry.name} differs from its NumPy twin")
        contestants[str(i)] = run
    seconds = take_turns(contestants, turns)
    return [seconds[str(i)] for i in range(len(entries))], seconds["copy"]


def spread(seconds: list[float]) -> float:
    """How many times the median the slow tenth takes."""
    return float(np.quantile(seconds, 0.9) / np.median(seconds))


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """Within one form, degree and size: the slowest number of segments against the fastest."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if row["form"].startswith("registers"):
            groups.setdefault((row["form"], row["degree"], row["size"]), []).append(row)
    found = []
    for (form, degree, size), group in groups.items():
        # Ratios turn by turn against the first, so that a busy moment slows both.
        first = group[0]["seconds"]
        ratios = [
            statistics.median(b / a for a, b in zip(first, row["seconds"], strict=True)) for row in group
        ]
        worst = max(ratios) / min(ratios)
        segments = f"{group[0]['segments']} to {group[-1]['segments']} segments"
        what = f"{form}, degree {degree}, {size} values, {segments}: slowest against fastest"
        found.append(Bar(what, worst, f"<= {CONSTANT}", worst <= CONSTANT))
    return found


def verdict(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At each error: how many times as fast the compiler's form is as the faster gathered one."""
    found = []
    for row in rows:
        if not row["form"].startswith("compiler's"):
            continue
        form = row["form"].replace("compiler's", "gather")
        gathered = [
            r for r in rows if (r["form"], r["function"], r["size"]) == (form, row["function"], row["size"])
        ]
        times = [
            statistics.median(b / a for a, b in zip(row["seconds"], g["seconds"], strict=True))
            for g in gathered
        ]
        found.append(
            {
                "function": row["function"],
                "size": row["size"],
                "error": row["form"].rpartition(" ")[2],
                "compiler": f"{row['segments']} cells of degree {row['degree']}",
                "gathered": [f"{g['segments']} cells of degree {g['degree']}" for g in gathered],
                "times_as_fast_as_gather": round(min(times), 2) if times else None,
            }
        )
    return found


def print_tables(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table as Text

    console = Console(width=140)
    table = Text(
        "function", "form", "degree", "segments", "proved error", "values", "G values / s", "of copy"
    )
    for row in record["rows"]:
        numbers = (f"{row['proved_error']:.1e}", row["size"], row["gigaelements"], row["share_of_copy"])
        table.add_row(
            row["function"], row["form"], str(row["degree"]), str(row["segments"]), *map(str, numbers)
        )
    console.print(table)
    for bar in record["bars"]:
        console.print(
            f"{'kept  ' if bar['kept'] else 'MISSED'} {bar['what']} {bar['measured']:.3f} ({bar['limit']})"
        )
    for line in record["gather"]:
        console.print(
            f"{line['function']}, {line['error']}, {line['size']} values: {line['compiler']} in registers is "
            f"{line['times_as_fast_as_gather']} times as fast as {' or '.join(line['gathered'])} gathered"
        )


if __name__ == "__main__":
    main()
