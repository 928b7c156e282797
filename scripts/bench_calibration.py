"""Peak memory and time of calibration against one float32 inference; writes results/bench_calibration.json.

300 samples by default. Each measurement is a process of its own. ``float32``: import the same, load the model, then
evaluate it once; its peak counts from the loaded model on. ``calibrate``: the same with calibration in place of the
inference; its peak is that of the whole process, loading included. Files of spilled values are not memory of a process.

The bars: the second peak below twice the first, also with what the imports alone take (``imports_mib``) taken off
both, and calibration below two minutes on two cores. Fewer photos than samples are taken round and round.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import json
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
        record["models"][model] = {**found, **judge(**found)}
        print(f"{model}: {record['models'][model]}", flush=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def judge(float32: dict[str, float], calibrate: dict[str, float]) -> dict[str, float | bool]:
    """Calibration's memory over an inference's, with and without the imports', and whether the bars are met."""
    peaks = calibrate["peak_mib"], float32["peak_mib"]
    imports = float32["imports_mib"]
    ratio, without = peaks[0] / peaks[1], (peaks[0] - imports) / (peaks[1] - imports)
    met = max(ratio, without) < MEMORY_BAR and calibrate["seconds"] < SECONDS_BAR
    return {
        "memory_ratio": round(ratio, 2),
        "memory_ratio_without_imports": round(without, 2),
        "met": met,
    }


def _child(what: str, model: str, samples: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", what, model, "--samples", str(samples)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(what: str, name: str, count: int) -> dict[str, float]:
    """Seconds of ``what`` ("float32" or "calibrate"), peak resident memory and that of the imports in MiB."""
    from tvm.relax.frontend.onnx import from_onnx  # noqa: F401  (loading imports it)

    from tvm_qfp8.calibration import calibrate, evaluate
    from tvm_qfp8.importers import load_model
    from tvm_qfp8.relay_passes.prepare import prepare

    imports = _mebibytes("VmRSS")
    model: Any = importlib.import_module(f"zoo.{name}")
    samples = model.calibration(count)
    mod = prepare(load_model(str(model.onnx_path()), input_shapes=model.input_shapes()).mod)
    if what == "float32":
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten (man 5 proc)
    started = time.perf_counter()
    if what == "float32":
        evaluate(mod, samples[0])
    else:
        calibrate(mod, itertools.islice(itertools.cycle(samples), count))
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 2), "peak_mib": _mebibytes("VmHWM"), "imports_mib": imports}


def _mebibytes(field: str) -> float:
    """A field of this process's status; unlike ``ru_maxrss`` it knows nothing of the process that started this one."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return round(int(line.split()[1]) / 1024, 1)
    raise KeyError(field)


if __name__ == "__main__":
    sys.exit(main())
