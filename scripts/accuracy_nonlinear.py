"""Whole models with only their nonlinear layers replaced by tables: scores against float32 in onnxruntime.

Every linear layer stays float32 (``Config(skip=("*",))``), so what changes is interpolation alone; no calibration.
The report's list of what each nonlinear layer became goes into the JSON beside the scores.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]
for _variable in ("OMP_NUM_THREADS", "TVM_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

from accuracy import conditions, print_table, score  # noqa: E402

from zoo.bars import Bar  # noqa: E402
from zoo.task import Model, compare_outputs  # noqa: E402

MODELS = ("minilm", "ppocr", "fashion_resnet")
RELATIVE_LOSS = 0.001


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--max-error", type=float, default=1e-3)
    parser.add_argument("--quick", action="store_true", help="a small part of each data set")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "accuracy_nonlinear.json")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bar is missed")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    if arguments.output.exists():
        results = json.loads(arguments.output.read_text())
    missed = False
    for name in arguments.models:
        model: Any = importlib.import_module(f"zoo.{name}")
        found = measure(model, arguments.max_error, arguments.quick)
        checked = bars(found)
        found["bars"] = [bar._asdict() for bar in checked]
        missed |= not all(bar.kept for bar in checked)
        results[name] = found
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
        print_table(model.NAME, found)
    return int(missed and arguments.check)


def measure(model: Model, max_error: float, quick: bool) -> dict[str, Any]:
    """Scores of float32 and of the model with tables, what the layers became, conditions."""
    import tvm_qfp8
    from zoo import peers

    path, tasks = model.onnx_path(), model.tasks(quick)
    reference = peers.session(path)
    config = tvm_qfp8.Config(max_error=max_error, skip=("*",))
    compiled = tvm_qfp8.compile(str(path), "native", input_shapes=model.input_shapes(), config=config)
    layers = compiled.report.layers
    if any(layer.weight_layout or layer.activation_layout for layer in layers):
        raise RuntimeError(f"{model.NAME}: a linear layer was quantized although all are skipped")
    outcomes = {task.name: task.outcomes(reference) for task in tasks}
    base = {
        task.name: {"metric": task.metric, "items": task.items, "score": task.score(outcomes[task.name])}
        for task in tasks
    }
    interpolated = {
        "tasks": {task.name: score(task, outcomes[task.name], compiled.run) for task in tasks},
        **compare_outputs(compiled.run, reference, model.probes(quick)),
        "layers": dict(Counter(layer.became for layer in layers)),
    }
    measured = conditions(0, quick) | {"max_error": max_error}
    return {"measured": measured, "runners": {"float32": {"tasks": base}, "interpolated": interpolated}}


def bars(found: dict[str, Any]) -> list[Bar]:
    """The score of every task stays within 0.1 % of float32's, to either side."""
    tasks = found["runners"]["interpolated"]["tasks"]
    return [
        Bar(
            f"{name}: relative change of the score",
            abs(scored["relative_loss"]),
            f"<= {RELATIVE_LOSS}",
            abs(scored["relative_loss"]) <= RELATIVE_LOSS,
        )
        for name, scored in tasks.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
