"""Recalibrates BatchNorm in ONNX files of a small ResNet, healthy and harmed; writes results/batchnorm.json.

The network of ``zoo.fashion_mnist`` is trained on Fashion-MNIST from three seeds and exported with BatchNorm in the
file. Harmed files have the weights of each convolution rounded to a few levels with one scale per tensor, statistics
left as they were. Each file is compiled with the same calibration images as it is and with
``Config(recalibrate_batchnorm=True)``, and scored on the 10,000 test images. Needs the extra torch.

``photos``: MobileNetV2 with its 36 calibration photos, which are too few and refused; and what it would come to if they
were not, because a metric that is never content with the old statistics takes the new ones.
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import json
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

import tvm_qfp8 as q
from zoo.bars import Bar
from zoo.fashion_mnist import SmallResNet, load, train
from zoo.machine import describe_machine

REPOSITORY = Path(__file__).resolve().parent.parent
PARTS = ("resnet", "photos")
SEEDS = (1, 2, 3)
RATE = 0.2
BATCH = 100
LEVELS = {"healthy": 0, "15 levels per tensor": 15, "7 levels per tensor": 7}
Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=60_000, help="of the training set")
    parser.add_argument("--calibration", type=int, default=16, help=f"batches of {BATCH} training images")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "results" / "batchnorm.json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    record: dict[str, Any] = {}
    if arguments.output.exists():
        record = json.loads(arguments.output.read_text())
    if "resnet" in arguments.parts:
        record |= resnet(arguments)
    if "photos" in arguments.parts:
        record["photos"] = photos()
        print(json.dumps(record["photos"], indent=1))
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")


def resnet(arguments: argparse.Namespace) -> dict[str, Any]:
    """All runs of the ResNet, their summary and the bars."""
    record: dict[str, Any] = {"machine": describe_machine(), "torch": torch.__version__}
    record |= {name: getattr(arguments, name) for name in ("epochs", "images", "calibration")} | {"runs": []}
    for seed in SEEDS[: arguments.seeds]:
        for found in runs(seed, arguments):
            record["runs"].append(found)
            print(json.dumps(found), flush=True)
    record["summary"] = summarize(record["runs"])
    record["bars"] = [bar._asdict() for bar in bars(record["runs"])]
    print(json.dumps({"summary": record["summary"], "bars": record["bars"]}, indent=1))
    return record


def photos() -> dict[str, Any]:
    """Top-1 of MobileNetV2 on the 108 photos, compiled in three ways."""
    from zoo import mobilenetv2

    (task,), path = mobilenetv2.tasks(), str(mobilenetv2.onnx_path())
    options: dict[str, Any] = {
        "input_shapes": mobilenetv2.input_shapes(),
        "calibration": mobilenetv2.calibration(36),
    }
    config = q.Config(recalibrate_batchnorm=True)
    never_content = itertools.count()
    modules = {
        "compiled": q.compile(path, **options),
        "recalibrated": q.compile(path, **options, config=config),
        "recalibrated without the guard": q.compile(
            path, **options, config=config, metric=lambda run: float(next(never_content))
        ),
    }
    found: dict[str, Any] = {"machine": describe_machine(), "photos": task.items}
    for name, module in modules.items():
        found[name] = {"top-1": task.score(task.outcomes(module.run)), "notes": module.report.notes}
    return found


def runs(seed: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracies of all settings of one seed."""
    torch.manual_seed(seed)
    images, labels = (part[: arguments.images] for part in load("train"))
    model = SmallResNet()
    train(model, images, labels, arguments.epochs, RATE, seed)
    samples = [{"image": images[i * BATCH :][:BATCH].numpy()} for i in range(arguments.calibration)]
    found = []
    for setting, levels in LEVELS.items():
        file = exported(rounded_coarsely(model, levels) if levels else model)
        session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
        plain = q.compile(file, calibration=samples)
        module = q.compile(file, calibration=samples, config=q.Config(recalibrate_batchnorm=True))
        found.append(
            {
                "seed": seed,
                "setting": setting,
                "file in float32": accuracy(lambda inputs, session=session: session.run(None, inputs)),
                "compiled": accuracy(plain.run),
                "recalibrated": accuracy(module.run),
                "note": module.report.notes[-1],
            }
        )
    return found


def exported(model: nn.Module) -> onnx.ModelProto:
    """The model as ONNX with its BatchNorm layers, in evaluation mode."""
    stream = io.BytesIO()
    torch.onnx.export(
        copy.deepcopy(model).eval(),
        (torch.zeros(BATCH, 1, 28, 28),),
        stream,
        dynamo=False,  # True would need the package onnxscript
        input_names=["image"],
        output_names=["logits"],
        training=torch.onnx.TrainingMode.PRESERVE,  # else the exporter folds BatchNorm
        do_constant_folding=False,
    )
    return onnx.load_from_string(stream.getvalue())


def rounded_coarsely(model: nn.Module, levels: int) -> nn.Module:
    """A copy whose convolutions have weights of ``levels`` equal steps per tensor."""
    harmed = copy.deepcopy(model)
    with torch.no_grad():
        for layer in harmed.modules():
            if isinstance(layer, nn.Conv2d):
                step = layer.weight.abs().max() / (levels // 2)
                layer.weight.copy_((layer.weight / step).round() * step)
    return harmed


def accuracy(run: Run) -> float:
    """Top-1 on the test images."""
    images, labels = (part.numpy() for part in load("t10k"))
    logits = [run({"image": images[i : i + BATCH]})[0] for i in range(0, len(images), BATCH)]
    return float((np.concatenate(logits).argmax(1) == labels).mean())


def summarize(found: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and standard deviation over the seeds, for each setting."""
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for setting in LEVELS:
        of_setting = [run for run in found if run["setting"] == setting]
        values = {
            key: [run[key] for run in of_setting] for key, value in found[0].items() if type(value) is float
        }
        values["gain"] = [run["recalibrated"] - run["compiled"] for run in of_setting]
        summary[setting] = {
            key: {
                "mean": round(statistics.fmean(numbers), 5),
                "deviation": round(statistics.stdev(numbers), 5) if len(numbers) > 1 else 0.0,
            }
            for key, numbers in values.items()
        }
    return summary


def bars(found: list[dict[str, Any]]) -> list[Bar]:
    """Never a loss, in no run; a gain where weights are coarse."""
    gains = {s: [r["recalibrated"] - r["compiled"] for r in found if r["setting"] == s] for s in LEVELS}
    least = min(min(values) for values in gains.values())
    coarse = statistics.fmean(gains["7 levels per tensor"])
    return [
        Bar("least gain of all runs", round(least, 5), ">= 0", least >= 0),
        Bar("mean gain with 7 levels", round(coarse, 5), "> 0", coarse > 0),
    ]


if __name__ == "__main__":
    main()
