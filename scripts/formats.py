"""Compares 8-bit number formats as post-training quantization on real models; writes results/formats.json.

Every case (model, format, weights only or with activations) is stored as soon as it is measured, and a run leaves out
the cases that are there: an interrupted run goes on where it stopped. ``--again`` measures anew.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]
for _variable in ("OMP_NUM_THREADS", "TVM_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import numpy as np  # noqa: E402
from format_study.formats import FORMATS  # noqa: E402
from format_study.simulate import Mode, NearestWeights, Network, Quantized  # noqa: E402

from tvm_qfp8.importers import load_model  # noqa: E402
from tvm_qfp8.relay_passes.prepare import prepare  # noqa: E402
from zoo.fetch import cache_dir  # noqa: E402
from zoo.machine import describe_machine  # noqa: E402
from zoo.task import BOOTSTRAP_SEED, Run, Task, sqnr_db  # noqa: E402

MODELS = ("mobilenetv2", "fashion_resnet", "minilm", "ppocr", "smollm2")
RESNET_SEEDS = (1, 2, 3)
MODES = {
    "weights": Mode(),
    "weights and activations": Mode(activations=True),
    "weights and activations by row": Mode(activations=True, by_row=True),
}
ROWS = ("minilm", "smollm2")
"""Models whose dense layers read more than one row of a sample, for which a scale for each is something else."""
RESAMPLES = 1000


def main() -> int:
    names = [one.name for one in FORMATS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--formats", nargs="+", choices=names, default=names)
    parser.add_argument("--samples", type=int, default=16, help="calibration samples (default: 16)")
    parser.add_argument("--quick", action="store_true", help="a small part of each data set")
    parser.add_argument("--no-tasks", action="store_true", help="output SQNR only")
    parser.add_argument("--again", action="store_true", help="measure cases anew that are there")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "formats.json")
    arguments = parser.parse_args()
    record = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for study in _studies(arguments):
        if record.get(study.name, {}).get("conditions") != study.conditions:
            record[study.name] = {"conditions": study.conditions, "cases": []}
        study.fill(record[study.name], lambda: _write(arguments.output, record))
    return 0


def _studies(arguments: argparse.Namespace) -> Iterator[Study]:
    for name in arguments.models:
        model: Any = importlib.import_module(f"zoo.{name}")
        if name == "fashion_resnet":
            for seed in RESNET_SEEDS:
                yield Study(f"{name} {seed}", model, model.onnx_path(seed), arguments)
        else:
            yield Study(name, model, model.onnx_path(), arguments)


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def _content(inputs: Mapping[str, np.ndarray]) -> bytes:
    return b"".join(x.tobytes() for x in inputs.values())


class Study:
    """All cases of one model; outcomes of tasks are kept in the cache, for the differences between formats."""

    def __init__(self, name: str, model: Any, file: Path, arguments: argparse.Namespace) -> None:
        self.name, self.model, self.file, self.arguments = name, model, file, arguments
        self.samples = self.model.calibration(arguments.samples)
        self.probes = self.model.probes(arguments.quick)
        self.tasks: list[Task] = [] if arguments.no_tasks else self.model.tasks(arguments.quick)
        self.conditions = {
            "calibration_samples": len(self.samples),
            "probes": len(self.probes),
            "items": {task.name: task.items for task in self.tasks},
            "bootstrap": {"seed": BOOTSTRAP_SEED, "resamples": RESAMPLES},
        }

    def fill(self, record: dict[str, Any], save: Any) -> None:
        """Measure what is missing, one case after the other."""
        done = {(case["format"], case["mode"]) for case in record["cases"]}
        if self.arguments.again:
            done = set()
        named = {one.name: one for one in FORMATS}
        missing = [
            (named[name], mode)
            for name in self.arguments.formats
            for mode, what in MODES.items()
            if not what.by_row or self.name in ROWS
            if (name, mode) not in done
        ]
        if not missing:
            return
        imported = load_model(str(self.file), input_shapes=self.model.input_shapes())
        network = Network(prepare(imported.mod), self.samples)
        exact, run = self._compared(network)
        self._outcomes("float32", "", run)
        record["metrics"] = {task.name: task.metric for task in self.tasks}
        record["scores"] = {task.name: task.score(self._stored("float32", "", task)) for task in self.tasks}
        nearest: NearestWeights | None = None
        for one, mode in missing:
            started = time.perf_counter()
            if nearest is None or nearest.format is not one:
                nearest = NearestWeights(network, one)
            quantized = Quantized(network, nearest, MODES[mode])
            found, run = self._compared(quantized)
            self._outcomes(one.name, mode, run)
            case = {
                "format": one.name,
                "mode": mode,
                "sqnr_db": round(sqnr_db(exact, found), 3),
                "tasks": {task.name: self._scored(one.name, mode, task) for task in self.tasks},
                "seconds": round(time.perf_counter() - started, 1),
                "measured": describe_machine(),
            }
            kept = [c for c in record["cases"] if (c["format"], c["mode"]) != (one.name, mode)]
            record["cases"] = [*kept, case]
            if one.name == "QFP8":
                self._compare_again(record["cases"], mode)
            save()
            print(f"{self.name:12} {one.name:20} {mode:24} {case['sqnr_db']:6.2f} dB", flush=True)

    def _compare_again(self, cases: list[dict[str, Any]], mode: str) -> None:
        """Differences to a new outcome of QFP8, where those of others are still there."""
        for case in cases:
            paths = [self._path(case["format"], mode, task) for task in self.tasks]
            if case["mode"] == mode and all(path.exists() for path in paths):
                case["tasks"] = {task.name: self._scored(case["format"], mode, task) for task in self.tasks}

    def _compared(self, of: Network | Quantized) -> tuple[np.ndarray, Run]:
        """What the SQNR is taken of, for all probes, and a runner; where that is a result, it knows those of probes."""
        if not of.compares_result:
            return np.concatenate([of.compare(probe) for probe in self.probes]), of.run
        results = [of.run(probe) for probe in self.probes]
        known = dict(zip(map(_content, self.probes), results, strict=True))
        return np.concatenate([r[0] for r in results]), lambda x: known.get(_content(x)) or of.run(x)

    def _path(self, format_: str, mode: str, task: Task) -> Path:
        label = f"{format_} {mode} {task.name} {task.items} {len(self.samples)}".replace(" ", "-")
        return cache_dir("formats", self.name.replace(" ", "-")) / f"{label}.npy"

    def _outcomes(self, format_: str, mode: str, run: Run) -> None:
        for task in self.tasks:
            np.save(self._path(format_, mode, task), task.outcomes(run))

    def _stored(self, format_: str, mode: str, task: Task) -> np.ndarray:
        return np.asarray(np.load(self._path(format_, mode, task)))

    def _scored(self, format_: str, mode: str, task: Task) -> dict[str, float]:
        """Score, its difference to QFP8's on the same items, and the standard error of that (paired bootstrap)."""
        outcomes = self._stored(format_, mode, task)
        result = {"score": task.score(outcomes)}
        if self._path("QFP8", mode, task).exists():
            ours = self._stored("QFP8", mode, task)
            rng = np.random.RandomState(BOOTSTRAP_SEED)
            drawn = [rng.randint(task.items, size=task.items) for _ in range(RESAMPLES)]
            differences = [task.value(outcomes, index) - task.value(ours, index) for index in drawn]
            result["above_qfp8"] = result["score"] - task.score(ours)
            result["standard_error"] = float(np.std(differences))
        return result


if __name__ == "__main__":
    sys.exit(main())
