"""Writes docs/formats.md from results/formats.json; ``--check`` only says whether it is current."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY / "scripts"), str(REPOSITORY)]

from format_study.formats import FORMATS  # noqa: E402

RESULTS, QAT = (REPOSITORY / "results" / name for name in ("formats.json", "qat.json"))
PAGE = REPOSITORY / "docs" / "formats.md"
MODES = ("weights", "weights and activations")
"""What every model is measured in."""
BY_ROW = "weights and activations by row"
SHORT = dict(zip((*MODES, BY_ROW), ("W", "W+A", "W+A rows"), strict=True))
RIVALS = [one.name for one in FORMATS if one.hardware and not one.ours]
HEAD = """# 8-bit formats compared

Made by `scripts/formats` from `results/formats.json` and by `scripts/qat` from `results/qat.json`; do not edit. Each
format gets the same calibration, that of `compile`: scales by the same search (least squared error, or the largest
value where it says max), one per output channel unless it says per tensor, activations one per tensor, embedding tables
one per row; then, layer after layer, weights rounded on data and the bias corrected on the calibration samples.
Nonlinear layers stay exact. It is a simulation in float32. Output SQNR is that of logits where a model ends in a
softmax.

Activations have one scale per tensor, whatever the format. `compile` also tries factors per channel, and a scale for
each row of what dense layers read, found at run time: "by row" is the latter, again for every format (a row is divided
by its largest magnitude, then all rows share one searched scale). In SmolLM2, which is large, weights do not make up
for the error of their input (`tvm_qfp8/calibration/compensation.py`), for time's sake; it starts from the weights of a
file of 4 and 8 bits.

`QFP8` is the default: weights in E2M5 or E1M6 by the layer's output error, activations by error among E1M6, E2M5, E3M4,
UE1M7, UE2M6 and UE3M5, those by row by that of the layers that read them. int8 activations are uint8 where
nothing is negative. NF8 is a free code book that no multiply-add unit computes: a reference, not a rival.
"""
Group = tuple[str, list[dict[str, Any]]]
"""A model and its records: one, or one for each seed that it was trained from."""


def main() -> int:
    current = page(json.loads(RESULTS.read_text()), json.loads(QAT.read_text()) if QAT.exists() else None)
    if "--check" in sys.argv[1:]:
        return int(not PAGE.exists() or PAGE.read_text() != current)
    PAGE.write_text(current)
    return 0


def page(record: dict[str, Any], trained: dict[str, Any] | None) -> str:
    """The whole page."""
    groups = model_groups(record)
    parts = [HEAD, _machine(groups), "## Output SQNR, dB\n", _sqnr(groups)]
    for group in groups:
        for task in group[1][0].get("scores", {}):
            parts += [f"## {group[0]}: {task}\n", _scores(group, task)]
    parts += ["## Where QFP8 does not win\n", _losses(groups)]
    if trained is not None:
        parts += ["## Recalibrated and trained\n", _trained(trained)]
    return "\n".join(parts)


def model_groups(record: dict[str, Any]) -> list[Group]:
    """Records whose names differ in the number at the end belong together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, found in record.items():
        groups.setdefault(name.rstrip("0123456789").strip() if " " in name else name, []).append(found)
    return list(groups.items())


def _machine(groups: list[Group]) -> str:
    lines = []
    for name, records in groups:
        machine, conditions = records[0]["cases"][-1]["measured"], records[0]["conditions"]
        items = ", ".join(f"{count} of {task}" for task, count in conditions["items"].items())
        seeds = f"{len(records)} seeds, mean and deviation; " if len(records) > 1 else ""
        lines.append(
            f"- {name}: {seeds}{conditions['calibration_samples']} calibration samples, outputs compared on "
            f"{conditions['probes']} inputs, scored on {items}; {machine['cpu']}, numpy "
            f"{machine['versions']['numpy']}, {machine['date']}"
        )
    return "\n".join(lines) + "\n"


def _cases(records: list[dict[str, Any]], name: str, mode: str) -> list[dict[str, Any]]:
    """The case of every record; empty unless all have it."""
    found = [c for r in records for c in r["cases"] if c["format"] == name and c["mode"] == mode]
    return found if len(found) == len(records) else []


def _modes(records: list[dict[str, Any]]) -> list[str]:
    """The modes that a model was measured in."""
    return [mode for mode in SHORT if any(_cases(records, one.name, mode) for one in FORMATS)]


def _mean_sqnr(cases: list[dict[str, Any]]) -> float:
    return fmean(case["sqnr_db"] for case in cases)


def mean_over_models(groups: list[Group], name: str, mode: str) -> float:
    """Mean output SQNR of a format in dB; NaN where a model lacks it."""
    found = [_cases(records, name, mode) for _, records in groups]
    return fmean(map(_mean_sqnr, found)) if all(found) else math.nan


def _sqnr(groups: list[Group]) -> str:
    """One row a format: each mode of each model, and the mean over models of those that all have."""
    columns = [(name, records, mode) for name, records in groups for mode in _modes(records)]
    heads = [f"{name}: W" if mode == MODES[0] else SHORT[mode] for name, _, mode in columns]
    lines = ["| format | " + " | ".join(heads) + " | mean: W | W+A |"]
    lines.append("|" + "---|" * (len(columns) + 3))
    for one in FORMATS:
        cells = [_sqnr_cell(_cases(records, one.name, mode)) for _, records, mode in columns]
        cells += [f"{mean_over_models(groups, one.name, mode):.1f}" for mode in MODES]
        name = f"**{one.name}**" if one.name == "QFP8" else one.name
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _sqnr_cell(cases: list[dict[str, Any]]) -> str:
    if not cases:
        return "-"
    deviation = f" ± {stdev(case['sqnr_db'] for case in cases):.1f}" if len(cases) > 1 else ""
    return f"{_mean_sqnr(cases):.1f}{deviation}"


def _scores(group: Group, task: str) -> str:
    exact = fmean(record["scores"][task] for record in group[1])
    show, bracket = _shown(group[1], task), "In brackets: against QFP8, with its standard error."
    if show is _perplexity:
        lines = [f"Perplexity, of which less is better; float32 {1 / exact:.3f}. {bracket}\n"]
    else:
        lines = [f"float32 {exact:.4f}. {bracket}\n"]
    modes = _modes(group[1])
    lines += ["| format | " + " | ".join(modes) + " |", "|---" * (len(modes) + 1) + "|"]
    for one in FORMATS:
        found = [_task(_cases(group[1], one.name, mode), task) for mode in modes]
        lines.append(f"| {one.name} | " + " | ".join(show(part) if part else "-" for part in found) + " |")
    return "\n".join(lines) + "\n"


def _task(cases: list[dict[str, Any]], task: str) -> dict[str, float]:
    """Score, difference to QFP8 and its standard error, of all seeds together."""
    parts = [case["tasks"][task] for case in cases if task in case["tasks"]]
    if not parts:
        return {}
    error = math.sqrt(sum(part["standard_error"] ** 2 for part in parts)) / len(parts)
    means = {key: fmean(part[key] for part in parts) for key in ("score", "above_qfp8")}
    return means | {"standard_error": error}


def _score(part: dict[str, float]) -> str:
    return f"{part['score']:.4f} ({part['above_qfp8']:+.4f} ± {part['standard_error']:.4f})"


def _perplexity(part: dict[str, float]) -> str:
    """The same of a score that is the inverse of a perplexity."""
    score, ours = part["score"], part["score"] - part["above_qfp8"]
    above, error = 1 / score - 1 / ours, part["standard_error"] / (score * ours)
    return f"{1 / score:.3f} ({above:+.3f} ± {error:.3f})"


def _shown(records: list[dict[str, Any]], task: str) -> Callable[[dict[str, float]], str]:
    """How a score is written."""
    return _perplexity if records[0].get("metrics", {}).get(task) == "1 / perplexity" else _score


def _losses(groups: list[Group]) -> str:
    """Every rival above QFP8's default: in SQNR, or in a score by more than one standard error."""
    lines, compared, above = [], 0, 0
    for model, records in groups:
        for mode in _modes(records):
            ours = _cases(records, "QFP8", mode)
            for name in RIVALS:
                cases = _cases(records, name, mode)
                if not cases or not ours:
                    continue
                gap = _mean_sqnr(cases) - _mean_sqnr(ours)
                if gap > 0:
                    lines.append(f"- {model}, {mode}: {name} has {gap:.1f} dB more output SQNR.")
                for task in cases[0]["tasks"]:
                    part, show = _task(cases, task), _shown(records, task)
                    compared += 1
                    if part["above_qfp8"] > part["standard_error"]:
                        above += 1
                        lines.append(f"- {model}, {mode}: {name} scores {show(part)} in {task}.")
    chance = (
        f"\n{above} of {compared} comparisons of scores are above one standard error: of formats that are as good as "
        "QFP8 one in six would be, by chance."
    )
    return "\n".join([*(lines or ["Nowhere, in what was measured."]), chance]) + "\n"


def _trained(record: dict[str, Any]) -> str:
    """Accuracies on Fashion-MNIST after rounding, after BatchNorm's recalibration and after training with rounding."""
    seeds, summary = len(record["runs"]), record["summary"]

    def cell(name: str) -> str:
        found = summary[name]
        return f"{100 * found['mean']:.2f} ± {100 * found['deviation']:.2f}"

    names = [key.removesuffix(" qat") for key in summary if key.endswith(" qat")]
    dates = sorted({run[f"{name} measured"] for run in record["runs"] for name in names})
    lines = [
        f"Top-1 of a small ResNet on the 10,000 test images of Fashion-MNIST in percent, mean and deviation of {seeds} "
        f"seeds; {record['machine']['cpu']}, torch {record['torch']}, {' and '.join(dates)}. float32: "
        f"{cell('float32')}, trained on as long as the others: {cell('float32 trained on')}. Weights are rounded to "
        "nearest here; int8 is symmetric.\n",
        "| format | rounded | BatchNorm recalibrated | trained with rounding |",
        "|---|---|---|---|",
    ]
    for name in names:
        cells = [cell(f"{name} {part}") for part in ("ptq", "bn", "qat")]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
