"""Times compiled models against onnxruntime and OpenVINO: contestants take turns, ratio of medians.

Every contestant has a process of its own (``zoo/contest.py``). The run also times a fixed amount of arithmetic
before and after: if that changes by more than a tenth the machine was noisy, and the JSON says so.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
MODELS = ("mobilenetv2", "ppocr", "minilm", "resnet50", "densenet121")
OURS = {"qfp8": 32, "qfp8 without samples": 0}
"""Contestants of this package and the samples that they are calibrated with."""

NOISY = 1.1


def main() -> None:
    from zoo.contest import contest_parser

    parser = contest_parser(__doc__, 12, REPOSITORY / "results" / "bench_models.json")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--threads", default="1,2")
    arguments = parser.parse_args()
    if arguments.serve:
        serve_runner(arguments.serve, arguments.module)
        return
    from zoo.machine import describe_machine

    record: dict[str, Any] = {"machine": describe_machine(), "turns": arguments.turns, "models": []}
    for name in arguments.models.split(","):
        modules, seconds = {}, {}
        for runner, samples in OURS.items():
            modules[runner], seconds[runner] = compile_model(name, samples)
        for threads in arguments.threads.split(","):
            print(f"{name}, {threads} thread(s)", file=sys.stderr)
            found = measure(name, modules, int(threads), arguments.turns)
            record["models"].append({"model": name, "compile_seconds": seconds, **found})
    add_scaling_efficiency(record["models"])
    print_table(record)
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {arguments.output}")


def compile_model(name: str, count: int) -> tuple[Path, float]:
    """Compile for this machine with so many calibration samples; (saved module, seconds)."""
    import tvm_qfp8
    from zoo.fetch import cache_dir

    model: Any = importlib.import_module(f"zoo.{name}")
    samples = model.calibration(count) if count else None
    started = time.perf_counter()
    compiled = tvm_qfp8.compile(
        str(model.onnx_path()),
        "native",
        input_shapes=model.input_shapes(),
        calibration=samples,
        config=tvm_qfp8.Config(check_finite=False),
    )
    seconds = time.perf_counter() - started
    output = cache_dir("bench") / f"{name}-{count}.so"
    compiled.export_library(output)
    return output, round(seconds, 1)


def measure(name: str, modules: dict[str, Path], threads: int, turns: int) -> dict[str, Any]:
    """Median milliseconds of every contestant."""
    from zoo.contest import contest
    from zoo.latency import PEERS

    commands = {
        runner: [__file__, "--serve", f"{name}:{runner}:{threads}", "--module", str(modules.get(runner, ""))]
        for runner in (*OURS, *PEERS)
    }
    before = reference_work()
    medians = contest(commands, threads, turns)
    after = reference_work()
    return {
        "threads": threads,
        "milliseconds": {runner: round(value, 3) for runner, value in medians.items()},
        "speedup": {r: round(v / medians["qfp8"], 3) for r, v in medians.items() if r != "qfp8"},
        "noisy": max(before, after) / min(before, after) > NOISY,
    }


def add_scaling_efficiency(rows: list[dict[str, Any]]) -> None:
    """To rows of several threads: time of one thread over threads times this row's time, for each contestant."""
    alone = {row["model"]: row["milliseconds"] for row in rows if row["threads"] == 1}
    for row in rows:
        if row["threads"] > 1 and row["model"] in alone:
            row["scaling_efficiency"] = {
                runner: round(alone[row["model"]][runner] / (row["threads"] * value), 3)
                for runner, value in row["milliseconds"].items()
            }


def serve_runner(which: str, module: Path) -> None:
    """Be one contestant."""
    import tvm_qfp8
    from zoo.contest import serve
    from zoo.latency import PEERS

    name, runner, threads = which.split(":")
    model: Any = importlib.import_module(f"zoo.{name}")

    def prepare() -> Callable[[], Any]:
        run = tvm_qfp8.load(module).run if runner in OURS else PEERS[runner](model, int(threads))
        return functools.partial(run, model.calibration(1)[0])

    serve(prepare)


def reference_work() -> float:
    """Seconds of a fixed amount of arithmetic, the least of several."""
    values = np.ones((256, 256), np.float32)

    def once() -> float:
        started = time.perf_counter()
        for _ in range(20):
            np.sin(values)
        return time.perf_counter() - started

    return min(once() for _ in range(5))


def print_table(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    for row in record["models"]:
        noisy = ", on a noisy machine" if row["noisy"] else ""
        efficiency = row.get("scaling_efficiency", {})
        table = Table(f"{row['model']}, {row['threads']} thread(s){noisy}", "ms", "QFP8 is faster by")
        if efficiency:
            table.add_column("scaling efficiency")
        for runner, milliseconds in row["milliseconds"].items():
            scaling = [f"{efficiency[runner]:.2f}"] if efficiency else []
            table.add_row(runner, f"{milliseconds:.2f}", f"{row['speedup'].get(runner, 1.0):.2f}", *scaling)
        Console().print(table)


if __name__ == "__main__":
    main()
