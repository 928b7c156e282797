"""Quantization-aware training on Fashion-MNIST: float32, rounding after training, and training with rounding.

For each seed a small ResNet is trained in float32, then rounded to each format as it is (ptq), with BatchNorm
re-estimated (bn), and trained on for some epochs with rounding (qat); float32 is trained on for as many epochs, too.
The QFP8 network is compiled and compared with what was trained. The seeds are fixed. What is stored of a seed is kept,
so an interrupted run goes on and a new format is added to the rest; ``--again`` starts anew. Needs the extra torch.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import tvm_qfp8 as q
from tvm_qfp8.format import LAYOUTS, Layout
from tvm_qfp8.torch import QATConfig, prepare_qat, recalibrate_batchnorm
from zoo.bars import Bar
from zoo.fashion_mnist import SmallResNet, accuracy, load, train
from zoo.machine import describe_machine

REPOSITORY = Path(__file__).resolve().parent.parent
SEEDS = tuple(range(11, 21))
RATE, TUNING_RATE = 0.2, 0.01
CALIBRATION_BATCHES, CALIBRATION_BATCH = 16, 128
FORMATS = {
    "QFP8": QATConfig(),
    "int8": QATConfig(weights="E1M6", activations="E1M6"),
    "E4M3": QATConfig(weights="E4M3", activations="E4M3"),
    "E5M2": QATConfig(weights="E5M2", activations="E5M2"),
}
"""int8 is symmetric: E1M6 is its grid. Scales are found and tracked by the same search for all."""
E5M2 = Layout("E5M2", 4, 2, signed=True)
"""For this comparison only: the upper 16 of its 32 exponents. What the others add lies below 2^-16 of the largest
value, and the grid would not fit into the integers that the package computes with."""
HARMED_LEVELS = 7
"""Steps up to a weight's largest value, in a network harmed on purpose to show what BatchNorm's statistics do."""
MOST_LOST = 0.001


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--tuning-epochs", type=int, default=1)
    parser.add_argument("--images", type=int, default=60_000, help="of the training set")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--again", action="store_true", help="measure anew what is stored")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "results" / "qat.json")
    arguments = parser.parse_args()
    LAYOUTS[E5M2.name] = E5M2
    warnings.filterwarnings("ignore", message=".*can be trained and compared")
    conditions = {name: getattr(arguments, name) for name in ("epochs", "tuning_epochs", "images")}
    stored: dict[int, dict[str, Any]] = {}
    if arguments.output.exists() and not arguments.again:
        record = json.loads(arguments.output.read_text())
        if {name: record[name] for name in conditions} == conditions:
            stored = {found["seed"]: found for found in record["runs"]}
    record = {"machine": describe_machine(), "torch": torch.__version__} | conditions
    for seed in SEEDS[: arguments.seeds]:
        stored[seed] = run(seed, stored.get(seed, {}), arguments)
        print(json.dumps(stored[seed]), flush=True)
        record["runs"] = list(stored.values())
        # A format that not every seed has yet is in neither summary nor bars.
        record["summary"] = summarize(record["runs"])
        record["bars"] = [bar._asdict() for bar in bars(record["runs"])]
        arguments.output.parent.mkdir(exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({"summary": record["summary"], "bars": record["bars"]}, indent=1))


def run(seed: int, found: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """All accuracies of one seed; what ``found`` has of it is not measured again."""
    missing = [name for name in arguments.formats.split(",") if f"{name} qat" not in found]
    if not missing and "harmed bn" in found:
        return found
    torch.manual_seed(seed)
    images, labels = (part[: arguments.images] for part in load("train"))
    test = load("t10k")
    model = SmallResNet()
    train(model, images, labels, arguments.epochs, RATE, seed)
    reached = accuracy(model, *test)
    if found.get("float32", reached) != reached:
        raise SystemExit(
            f"seed {seed} gives another float32 network here ({reached} correct, stored: {found['float32']}), "
            "which the stored results cannot be compared with; measure all of them with --again"
        )
    if not found:
        trained_on = copy.deepcopy(model)
        train(trained_on, images, labels, arguments.tuning_epochs, TUNING_RATE, seed)
        found = {"seed": seed, "float32": reached, "float32 trained on": accuracy(trained_on, *test)}
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    batches = images[chosen[: CALIBRATION_BATCH * CALIBRATION_BATCHES]].split(CALIBRATION_BATCH)
    for name in missing:
        tuned = copy.deepcopy(model)
        prepare_qat(tuned, FORMATS[name], batches=batches)
        found[f"{name} ptq"] = accuracy(tuned, *test)
        recalibrated = copy.deepcopy(tuned)
        done = recalibrate_batchnorm(recalibrated, batches)
        found[f"{name} bn"] = accuracy(recalibrated, *test)
        found[f"{name} bn kept old"] = done.kept_old
        train(tuned, images, labels, arguments.tuning_epochs, TUNING_RATE, seed)
        found[f"{name} qat"] = accuracy(tuned, *test)
        found[f"{name} measured"] = describe_machine()["date"]
        if name == "QFP8":
            found["features that differ when compiled"] = differing(tuned, test[0][:256])
    if "harmed bn" not in found:
        harmed = rounded_coarsely(model)
        prepare_qat(harmed, batches=batches)
        found["harmed ptq"] = accuracy(harmed, *test)
        found["harmed bn kept old"] = recalibrate_batchnorm(harmed, batches).kept_old
        found["harmed bn"] = accuracy(harmed, *test)
    return found


def rounded_coarsely(model: nn.Module) -> nn.Module:
    """A copy whose convolutions have weights of 15 levels per tensor."""
    harmed = copy.deepcopy(model)
    with torch.no_grad():
        for layer in harmed.modules():
            if isinstance(layer, nn.Conv2d):
                step = layer.weight.abs().max() / HARMED_LEVELS
                layer.weight.copy_((layer.weight / step).round() * step)
    return harmed


def differing(model: nn.Module, images: torch.Tensor) -> int:
    """Of the last feature maps, what the compiled module has other than the trained model, to the bit.

    Behind them stands a mean, which torch adds up in another order.
    """
    features = nn.Sequential(model.stem, model.blocks)
    module = q.compile(torch.export.export(features, (images,)))
    (compiled,) = module(images.numpy())
    with torch.no_grad():
        return int(np.count_nonzero(compiled != features(images).numpy()))


def summarize(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over the seeds."""
    found = {}
    for name in runs[0]:
        if not all(name in run for run in runs):
            continue
        values = [run[name] for run in runs]
        if isinstance(values[0], float):
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            found[name] = {"mean": round(statistics.fmean(values), 5), "deviation": round(deviation, 5)}
    return found


def bars(runs: list[dict[str, Any]]) -> list[Bar]:
    """What was asked: within 0.1 points of float32, below no other format by more than a paired standard error."""
    checked = []

    def difference(name: str, other: str) -> tuple[float, float]:
        values = [run[name] - run[other] for run in runs]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        return statistics.fmean(values), error

    mean, _ = difference("QFP8 qat", "float32")
    checked.append(Bar("QFP8 qat less float32", round(mean, 5), f">= {-MOST_LOST}", mean >= -MOST_LOST))
    for name in FORMATS:
        if name != "QFP8" and all(f"{name} qat" in run for run in runs):
            mean, error = difference("QFP8 qat", f"{name} qat")
            limit = -error if name == "int8" else 0.0
            checked.append(Bar(f"QFP8 qat less {name} qat", round(mean, 5), f">= {limit:.5f}", mean >= limit))
    for name in (*FORMATS, "harmed"):
        if all(f"{name} bn" in run for run in runs):
            mean, error = difference(f"{name} bn", f"{name} ptq")
            checked.append(Bar(f"{name} bn less ptq", round(mean, 5), f">= {-error:.5f}", mean >= -error))
    total = sum(run["features that differ when compiled"] for run in runs)
    checked.append(Bar("features that differ when compiled", float(total), "0", total == 0))
    return checked


if __name__ == "__main__":
    main()
