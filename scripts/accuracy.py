"""Task scores of float32, the int8 of onnxruntime and NNCF, and QFP8 on real models; writes results/accuracy.json.

Models and data are fetched as needed (see scripts/zoo/fetch.py). Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]
for _variable in ("OMP_NUM_THREADS", "TVM_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

from zoo.bars import bars  # noqa: E402
from zoo.machine import describe_machine  # noqa: E402
from zoo.task import BOOTSTRAP_SEED, RESAMPLES, Model, Run, Task, compare_outputs, paired_bootstrap  # noqa: E402

MODELS = ("ppocr", "mobilenetv2", "minilm", "smollm2")
RUNNERS = ("float32", "int8", "nncf", "qfp8", "qfp8 without samples")
DATA_PACKAGES = ("nncf", "pillow", "tokenizers", "scikit-learn")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument(
        "--runners", nargs="+", choices=RUNNERS[1:], default=RUNNERS[1:], help="beside float32"
    )
    parser.add_argument(
        "--samples", type=int, default=64, help="calibration samples (default: 64, or all there are)"
    )
    parser.add_argument("--quick", action="store_true", help="a small part of each data set")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "accuracy.json")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bar is missed")
    arguments = parser.parse_args()

    results: dict[str, Any] = {}
    if arguments.output.exists():
        results = json.loads(arguments.output.read_text())
    missed = False
    for name in arguments.models:
        model: Any = importlib.import_module(f"zoo.{name}")
        found = measure(model, arguments.runners, arguments.samples, arguments.quick)
        found = joined(results.get(name), found)
        if "qfp8" in found["runners"]:
            checked = bars(name, found)
            found["bars"] = [bar._asdict() for bar in checked]
            missed |= not all(bar.kept for bar in checked)
        results[name] = found
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
        print_table(model.NAME, found)
    return int(missed and arguments.check)


def joined(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """``new`` with those runners of ``old`` that it lacks, where float32 had the same scores; each says when it ran."""
    if old is None or old["runners"]["float32"] != new["runners"]["float32"]:
        return new
    if old["runners"].keys() <= new["runners"].keys():
        return new
    measured = {
        name: {**part, "measured": new["measured"]}
        for name, part in new["runners"].items()
        if name != "float32"
    }
    return {**old, "runners": {**old["runners"], **measured}}


def measure(model: Model, runners: list[str], samples: int, quick: bool) -> dict[str, Any]:
    """Everything about one model, as it is written to the JSON."""
    from zoo import peers

    tasks, probes = model.tasks(quick), model.probes(quick)
    reference = peers.session(model.onnx_path())
    outcomes = {task.name: task.outcomes(reference) for task in tasks}
    found: dict[str, Any] = {"measured": conditions(len(model.calibration(samples)), quick), "runners": {}}
    found["runners"]["float32"] = {
        "tasks": {
            t.name: {"metric": t.metric, "items": t.items, "score": t.score(outcomes[t.name])} for t in tasks
        }
    }
    for runner in runners:
        started = time.perf_counter()
        run, facts = build(model, runner, samples)
        seconds = time.perf_counter() - started
        found["runners"][runner] = {
            "tasks": {task.name: score(task, outcomes[task.name], run) for task in tasks},
            **compare_outputs(run, reference, probes),
            **facts,
            "build_seconds": round(seconds, 1),
        }
    return found


def build(model: Model, runner: str, samples: int) -> tuple[Run, dict[str, Any]]:
    """One runner of a model, and what is worth knowing about it beside its scores."""
    if runner == "int8":
        from zoo import peers

        return peers.session(peers.int8_path(model, samples)), {"seven_bit_weights": not peers.has_vnni()}
    if runner == "nncf":
        from zoo.nncf_peer import nncf_int8

        return nncf_int8(model, samples), {}
    import tvm_qfp8
    from tvm_qfp8.cli.console import StageProgress

    path = model.onnx_path()
    calibration = model.calibration(samples) if runner == "qfp8" else None
    with StageProgress(f"compiling {path.name}", quiet=False) as progress:
        compiled = tvm_qfp8.compile(
            str(path), "native", input_shapes=model.input_shapes(), calibration=calibration, progress=progress
        )
    return compiled.run, {"totals": compiled.report.totals, "calibration_samples": len(calibration or ())}


def score(task: Task, reference: Any, run: Run) -> dict[str, Any]:
    """Score of a runner with its loss against float32."""
    outcomes = task.outcomes(run)
    return {
        "metric": task.metric,
        "items": task.items,
        "score": task.score(outcomes),
        **paired_bootstrap(task, reference, outcomes),
    }


def conditions(samples: int, quick: bool) -> dict[str, Any]:
    """Machine, versions, date and seeds of a measurement."""
    found = describe_machine()
    for package in DATA_PACKAGES:
        try:
            found["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    bootstrap = {"seed": BOOTSTRAP_SEED, "resamples": RESAMPLES}
    return found | {"calibration_samples": samples, "quick": quick, "bootstrap": bootstrap}


def print_table(title: str, found: dict[str, Any]) -> None:
    """Scores of the runners side by side, then the bars."""
    from rich.console import Console
    from rich.table import Table

    runners = found["runners"]
    table = Table("task", *runners, title=title, title_justify="left")
    for task, base in runners["float32"]["tasks"].items():
        cells = [f"{base['score']:.4f}"]
        for runner in list(runners)[1:]:
            part = runners[runner]["tasks"][task]
            change, low, high = (
                f"{0 - 100 * part[key]:+.2f}" for key in ("relative_loss", "relative_high", "relative_low")
            )
            cells.append(f"{part['score']:.4f}  {change} % [{low}, {high}]")
        table.add_row(f"{task}, {base['metric']} ({base['items']})", *cells)
    for key, label, digits in (("sqnr_db", "output SQNR, dB", 1), ("agreement", "same largest output", 3)):
        table.add_row(label, "", *(f"{runners[runner][key]:.{digits}f}" for runner in list(runners)[1:]))
    console = Console()
    console.print(table)
    for bar in found.get("bars", ()):
        mark = "[green]kept  [/green]" if bar["kept"] else "[red]missed[/red]"
        console.print(f"  {mark} {bar['what']} {bar['measured']:.4f} ({bar['limit']})", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
