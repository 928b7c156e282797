"""A pretrained model from its raw ONNX file to 8 bits: fetch, calibrate, compile, save, load elsewhere, compare.

The module is loaded and scored in a process of its own, which never sees the ONNX file's weights in QFP8's compiler;
there, calls of float32 (onnxruntime) and QFP8 are timed in turn, on one thread.
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
from pathlib import Path
from typing import Any

MODELS = ("ppocr", "mobilenetv2", "minilm")
TIMED_CALLS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--samples", type=int, default=32, help="calibration samples (default: 32)")
    parser.add_argument("--all", action="store_true", help="score the whole data set, not a part of it")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model: Any = importlib.import_module(f"zoo.{arguments.model}")
    if arguments.measure:
        json.dump(measure(model, arguments.measure, quick=not arguments.all), sys.stdout)
        return
    module, seconds = compile_model(model, arguments.samples)
    print(f"compiled and saved in {seconds:.0f} s; loading it in a fresh process, scoring both")
    command = [sys.executable, __file__, "--model", arguments.model, "--measure", str(module)]
    environment = os.environ | {"TVM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *["--all"] * arguments.all], env=environment, stdout=subprocess.PIPE, check=True
    )
    print_table(model, module, json.loads(done.stdout))


def compile_model(model: Any, samples: int) -> tuple[Path, float]:
    """Compile for this machine; (path of the saved module, seconds)."""
    import tvm_qfp8
    from tvm_qfp8.cli.console import StageProgress
    from zoo.fetch import cache_dir

    print(f"fetching {model.NAME}")
    path = model.onnx_path()
    calibration = model.calibration(samples)
    output = cache_dir("demo") / f"{model.NAME}.so"
    started = time.perf_counter()
    with StageProgress(f"compiling {path.name}", quiet=False) as progress:
        compiled = tvm_qfp8.compile(
            str(path), "native", input_shapes=model.input_shapes(), calibration=calibration, progress=progress
        )
        compiled.export_library(output)
    return output, time.perf_counter() - started


def measure(model: Any, module: Path, quick: bool) -> dict[str, Any]:
    """Scores and milliseconds a call of both, in this process."""
    import onnxruntime

    import tvm_qfp8

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(model.onnx_path()), options, providers=["CPUExecutionProvider"]
    )
    loaded = tvm_qfp8.load(module)
    runners = {"float32": lambda inputs: session.run(None, inputs), "QFP8": loaded.run}
    found: dict[str, Any] = {"scores": [], "weights": loaded.report.totals.get("weight bytes", "")}
    for task in model.tasks(quick):
        scores = {name: task.score(task.outcomes(run)) for name, run in runners.items()}
        found["scores"].append([task.name, task.metric, task.items, scores])
    sample = model.calibration(1)[0]
    times: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(-2, TIMED_CALLS):
        for name, run in runners.items():
            started = time.perf_counter()
            run(sample)
            if turn >= 0:
                times[name].append(time.perf_counter() - started)
    found["milliseconds"] = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    return found


def print_table(model: Any, module: Path, found: dict[str, Any]) -> None:
    """Print float32 beside QFP8."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "float32", "QFP8", "", title=model.NAME, title_justify="left")
    for name, metric, items, scores in found["scores"]:
        change = f"{(scores['QFP8'] / scores['float32'] - 1) * 100:+.2f} %" if scores["float32"] else ""
        table.add_row(
            f"{name}, {metric} ({items})", f"{scores['float32']:.4f}", f"{scores['QFP8']:.4f}", change
        )
    before, after = model.onnx_path().stat().st_size, module.stat().st_size
    table.add_row(
        "file, MiB", f"{before / 2**20:.2f}", f"{after / 2**20:.2f}", f"{after / before:.2f} of float32"
    )
    slow, fast = found["milliseconds"]["float32"], found["milliseconds"]["QFP8"]
    table.add_row("one call, 1 thread, ms", f"{slow:.2f}", f"{fast:.2f}", f"{slow / fast:.2f} times as fast")
    Console().print(table)
    print(f"weights, bytes: {found['weights']}")
    print(f"the module: {module}\nwhat became of each layer: .venv/bin/tvm-qfp8 report {module}")


if __name__ == "__main__":
    main()
