"""Peak memory and time of calibration against one float32 inference; writes results/bench_calibration.json.

300 samples by default. Each measurement is a process of its own. The bars: peak resident memory (pages of spill files
that the system keeps count, too) below twice that of a process which imports the same, loads the model and evaluates it
once in float32, and below two minutes on two cores. Fewer photos than samples are taken round and round.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

MODELS = ("minilm", "mobilenetv2")
MEMORY_BAR, SECONDS_BAR = 2.0, 120.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "bench_calibration.json")
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child, arguments.samples)))
        return 0
    from zoo.machine import describe_machine

    record: dict[str, Any] = {"machine": describe_machine(), "samples": arguments.samples, "models": {}}
    for model in arguments.models:
        found = {what: _child(what, model, arguments.samples) for what in ("float32", "calibrate")}
        ratio = found["calibrate"]["peak_mib"] / found["float32"]["peak_mib"]
        met = ratio < MEMORY_BAR and found["calibrate"]["seconds"] < SECONDS_BAR
        record["models"][model] = {**found, "memory_ratio": round(ratio, 2), "met": met}
        print(f"{model}: {found}, {ratio:.2f} times the memory, {'met' if met else 'missed'}", flush=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def _child(what: str, model: str, samples: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", what, model, "--samples", str(samples)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(what: str, name: str, count: int) -> dict[str, float]:
    """Seconds of ``what`` ("float32" or "calibrate") and peak resident memory of this process in MiB."""
    from tvm_qfp8.calibration import calibrate, evaluate
    from tvm_qfp8.importers import load_model
    from tvm_qfp8.relay_passes.prepare import prepare

    model: Any = importlib.import_module(f"zoo.{name}")
    samples = model.calibration(count)
    mod = prepare(load_model(str(model.onnx_path()), input_shapes=model.input_shapes()).mod)
    started = time.perf_counter()
    if what == "float32":
        evaluate(mod, samples[0])
    else:
        calibrate(mod, itertools.islice(itertools.cycle(samples), count))
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": round(seconds, 2), "peak_mib": round(peak, 1)}


if __name__ == "__main__":
    sys.exit(main())
