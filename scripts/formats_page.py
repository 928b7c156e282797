"""Writes docs/formats.md from results/formats.json; ``--check`` only says whether it is current."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY / "scripts"), str(REPOSITORY)]

from format_study.formats import FORMATS  # noqa: E402

RESULTS = REPOSITORY / "results" / "formats.json"
PAGE = REPOSITORY / "docs" / "formats.md"
MODES = ("weights", "weights and activations")
RIVALS = [one.name for one in FORMATS if one.hardware and not one.ours]
HEAD = """# 8-bit formats compared

Made by `scripts/formats` from `results/formats.json`; do not edit. Each format gets the same calibration: weights
rounded to nearest, scales by the same search (least squared error, or the largest value where it says max), one per
output channel unless it says per tensor, activations one per tensor, embedding tables one per row, and the bias of
every linear layer corrected on the calibration samples. Nonlinear layers stay exact. It is a simulation in float32;
data-driven rounding, which `compile` adds, is left out for all. Output SQNR is that of logits where a model ends in a
softmax.

`QFP8` is the default: E2M5 weights, and activations by error among E2M5, E3M4, UE2M6 and UE3M5. `QFP8 chosen` takes
each weight's layout by error among E1M6, E2M5 and E3M4, too. int8 activations are uint8 where nothing is negative. NF8
is a free code book that no multiply-add unit computes: a reference, not a rival.
"""


def main() -> int:
    current = page(json.loads(RESULTS.read_text()))
    if "--check" in sys.argv[1:]:
        return int(not PAGE.exists() or PAGE.read_text() != current)
    PAGE.write_text(current)
    return 0


def page(record: dict[str, Any]) -> str:
    """The whole page."""
    parts = [HEAD, _machine(record), "## Output SQNR, dB\n", _sqnr(record)]
    for model, found in record.items():
        for task in found.get("scores", {}):
            parts += [f"## {model}: {task}\n", _scores(found, task)]
    return "\n".join([*parts, "## Where QFP8 does not win\n", _losses(record)])


def _machine(record: dict[str, Any]) -> str:
    lines = []
    for model, found in record.items():
        if found["cases"]:
            machine, conditions = found["cases"][-1]["measured"], found["conditions"]
            lines.append(
                f"- {model}: {conditions['calibration_samples']} calibration samples, outputs compared on "
                f"{conditions['probes']} inputs; {machine['cpu']}, numpy {machine['versions']['numpy']}, "
                f"{machine['date']}"
            )
    return "\n".join(lines) + "\n"


def _value(found: dict[str, Any], name: str, mode: str) -> dict[str, Any] | None:
    return next((c for c in found["cases"] if c["format"] == name and c["mode"] == mode), None)


def _sqnr(record: dict[str, Any]) -> str:
    """One row a format: weights / weights and activations of each model, and their mean where all are there."""
    lines = ["| format | " + " | ".join(f"{m}: W | W+A" for m in record) + " | mean: W | W+A |"]
    lines.append("|" + "---|" * (2 * len(record) + 3))
    for one in FORMATS:
        cases = [[_value(found, one.name, mode) for mode in MODES] for found in record.values()]
        if not any(case for pair in cases for case in pair):
            continue
        cells = [f"{case['sqnr_db']:.1f}" if case else "-" for pair in cases for case in pair]
        for column in zip(*cases, strict=True):
            values = [case["sqnr_db"] for case in column if case]
            cells.append(f"{sum(values) / len(values):.1f}" if len(values) == len(column) else "-")
        name = f"**{one.name}**" if one.name == "QFP8" else one.name
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _scores(found: dict[str, Any], task: str) -> str:
    lines = [f"float32 {found['scores'][task]:.4f}. In brackets: against QFP8, with its standard error.\n"]
    lines += ["| format | " + " | ".join(MODES) + " |", "|---|---|---|"]
    for one in FORMATS:
        cells = []
        for mode in MODES:
            case = _value(found, one.name, mode)
            part = case["tasks"].get(task) if case else None
            cells.append(_score(part) if part else "-")
        lines.append(f"| {one.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _score(part: dict[str, float]) -> str:
    if "above_qfp8" not in part:
        return f"{part['score']:.4f}"
    return f"{part['score']:.4f} ({part['above_qfp8']:+.4f} ± {part['standard_error']:.4f})"


def _losses(record: dict[str, Any]) -> str:
    """Every rival above QFP8's default: in SQNR, or in a score by more than one standard error."""
    lines = []
    for model, found in record.items():
        for mode in MODES:
            ours = _value(found, "QFP8", mode)
            for name in RIVALS if ours else ():
                case = _value(found, name, mode)
                if case and ours and case["sqnr_db"] > ours["sqnr_db"]:
                    gap = case["sqnr_db"] - ours["sqnr_db"]
                    lines.append(f"- {model}, {mode}: {name} has {gap:.1f} dB more output SQNR.")
                for task, part in (case or {"tasks": {}})["tasks"].items():
                    if part.get("above_qfp8", 0) > part.get("standard_error", 0):
                        lines.append(f"- {model}, {mode}: {name} scores {_score(part)} in {task}.")
    return "\n".join(lines or ["Nowhere, in what was measured."]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
