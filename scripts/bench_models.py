"""Times compiled models against onnxruntime and OpenVINO: calls in turn in one process, ratio of medians.

Every thread count has a process of its own, since TVM reads TVM_NUM_THREADS once. One call of every runner makes a
round; the order of a round is always the same, and the figure is the median over rounds. The run also times a fixed
amount of arithmetic before and after: if that changes by more than a tenth the machine was noisy, and the JSON says so.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
MODELS = ("mobilenetv2", "ppocr", "minilm")
NOISY = 1.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "results" / "bench_models.json")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, module, threads = arguments.measure.split(":")
        json.dump(measure(name, Path(module), int(threads), arguments.repeats), sys.stdout)
        return
    from zoo.machine import describe_machine

    record: dict[str, Any] = {"machine": describe_machine(), "repeats": arguments.repeats, "models": []}
    for name in arguments.models.split(","):
        module, compile_seconds = compile_model(name)
        for threads in arguments.threads.split(","):
            print(f"{name}, {threads} thread(s)", file=sys.stderr)
            found = run_measurement(name, module, threads, arguments.repeats)
            record["models"].append({"model": name, "compile_seconds": compile_seconds, **found})
    print_table(record)
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {arguments.output}")


def compile_model(name: str) -> tuple[Path, float]:
    """Compile for this machine with 32 calibration samples; (saved module, seconds)."""
    import tvm_qfp8
    from zoo.fetch import cache_dir

    model: Any = importlib.import_module(f"zoo.{name}")
    samples = model.calibration(32)
    started = time.perf_counter()
    compiled = tvm_qfp8.compile(
        str(model.onnx_path()),
        "native",
        input_shapes=model.input_shapes(),
        calibration=samples,
        config=tvm_qfp8.Config(check_finite=False),
    )
    seconds = time.perf_counter() - started
    output = cache_dir("bench") / f"{name}.so"
    compiled.export_library(output)
    return output, round(seconds, 1)


def run_measurement(name: str, module: Path, threads: str, repeats: int) -> dict[str, Any]:
    """``measure`` in a fresh process with that many threads."""
    environment = os.environ | {"TVM_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
    command = [sys.executable, __file__, "--measure", f"{name}:{module}:{threads}", "--repeats", str(repeats)]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def measure(name: str, module: Path, threads: int, repeats: int) -> dict[str, Any]:
    """Median milliseconds of every runner, called in turn."""
    import tvm_qfp8

    model: Any = importlib.import_module(f"zoo.{name}")
    from zoo.latency import latency_peers

    sample = model.calibration(1)[0]
    runners: dict[str, Callable[[dict], Any]] = latency_peers(model, threads)
    runners["qfp8"] = tvm_qfp8.load(module).run
    before = reference_work()
    times: dict[str, list[float]] = {runner: [] for runner in runners}
    for turn in range(-3, repeats):
        for runner, run in runners.items():
            started = time.perf_counter()
            run(sample)
            if turn >= 0:
                times[runner].append(time.perf_counter() - started)
    after = reference_work()
    medians = {runner: statistics.median(values) * 1e3 for runner, values in times.items()}
    return {
        "threads": threads,
        "milliseconds": {runner: round(value, 3) for runner, value in medians.items()},
        "speedup": {r: round(v / medians["qfp8"], 3) for r, v in medians.items() if r != "qfp8"},
        "noisy": max(before, after) / min(before, after) > NOISY,
    }


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

    names = sorted({runner for row in record["models"] for runner in row["milliseconds"]} - {"qfp8"})
    table = Table("model", "threads", "qfp8 ms", *[f"{n} ms (x)" for n in names], "")
    for row in record["models"]:
        cells = [
            f"{row['milliseconds'][n]:.2f} ({row['speedup'][n]:.2f})" if n in row["speedup"] else "-"
            for n in names
        ]
        quiet = "noisy machine" if row["noisy"] else ""
        table.add_row(row["model"], str(row["threads"]), f"{row['milliseconds']['qfp8']:.2f}", *cells, quiet)
    Console().print(table)


if __name__ == "__main__":
    main()
