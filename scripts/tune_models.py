"""Tunes the kernels of the zoo's models for this machine, within a given number of minutes.

All models' kernels are tuned as one set, so equal ones are tuned once. Threads are tuned one after the other, each
number with its share of the time. ``kernels`` among the models stands for the single layers that
``scripts/bench kernels`` times with one thread.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

KERNELS = "kernels"
REPOSITORY = Path(__file__).resolve().parent.parent
MODELS = ("mobilenetv2", "ppocr", "minilm", KERNELS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="for everything together; no limit without")
    parser.add_argument(
        "--trials", type=int, default=200, help="schedules per kernel, those in the log included"
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--logs", type=Path, default=REPOSITORY / "tuning_logs")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "results" / "tuning.json")
    arguments = parser.parse_args()

    from tvm_qfp8.cli.tune import format_results
    from tvm_qfp8.errors import QFP8Error
    from tvm_qfp8.targets import parse_target
    from tvm_qfp8.tuning.session import entry, tune_workloads
    from zoo.machine import describe_machine

    counts = [int(text) for text in arguments.threads.split(",")]
    record: dict[str, Any] = {"machine": describe_machine(), "trials": arguments.trials, "threads": {}}
    for threads in counts:
        # Measuring processes inherit this.
        os.environ["TVM_NUM_THREADS"] = str(threads)
        workloads: Counter = Counter()
        for name in arguments.models.split(","):
            if name != KERNELS:
                workloads += collect(name, threads)
            elif threads == 1:
                workloads += collect_cases()
        print(f"{threads} thread(s): {len(workloads)} kernels")
        try:
            session = tune_workloads(
                workloads,
                parse_target("native"),
                arguments.logs,
                trials=arguments.trials,
                minutes=arguments.minutes and arguments.minutes / len(counts),
            )
        except QFP8Error as error:
            raise SystemExit(f"error: {error}") from error
        print(format_results(session.results))
        record["threads"][threads] = [entry(result) for result in session.results if result.trials]
        if session.interrupted:
            print("stopped; the same command goes on from here")
            break
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"log: {session.folder}\nwritten to {arguments.output}")


def collect(name: str, threads: int) -> Counter:
    """Kernels of one model, with samples and without as in the benchmarks: the layouts decide which there are."""
    import tvm_qfp8
    from tvm_qfp8.tuning.collect import collect_workloads

    print(f"reading {name}")
    model: Any = importlib.import_module(f"zoo.{name}")
    found: Counter = Counter()
    for calibration in (model.calibration(32), None):
        found += collect_workloads(
            str(model.onnx_path()),
            "native",
            input_shapes=model.input_shapes(),
            calibration=calibration,
            config=tvm_qfp8.Config(threads=threads),
        )
    return found


def collect_cases() -> Counter:
    """Kernels of the benchmark of single layers, in the layouts that it times."""
    from kernel_bench import ours
    from kernel_bench.cases import FAMILIES
    from tvm_qfp8.topi.static_memory import StaticMemory
    from tvm_qfp8.tuning.collect import recording

    found: Counter = Counter()
    for family, cases in FAMILIES.items():
        timed = (ours.LAYOUTS,) if family == "depthwise" else (ours.LAYOUTS, ours.LINEAR_LAYOUTS)
        for case, layouts in itertools.product(cases, timed):
            activations, weights = layouts[type(case)]
            ours.executable(case, "native", activations, recording(found), StaticMemory(), weights)
    return found


if __name__ == "__main__":
    main()
