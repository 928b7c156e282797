"""Trains a small ResNet on Fashion-MNIST with exact and with interpolated activations, from the same seeds.

Both start from the same weights and see the same batches. Needs the extra torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from tvm_qfp8.torch import replace_activations
from zoo.bars import Bar
from zoo.fashion_mnist import SmallResNet, accuracy, load, train
from zoo.machine import describe_machine

REPOSITORY = Path(__file__).resolve().parent.parent
SEEDS = (1, 2, 3)
RATE = 0.2
MAX_LOSS = 0.005


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--max-error", type=float, default=1e-3)
    parser.add_argument("--images", type=int, default=60_000, help="of the training set")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "results" / "train_interpolated.json")
    arguments = parser.parse_args()
    runs = []
    for seed in SEEDS:
        for kind in ("exact", "interpolated"):
            runs.append(run(kind, seed, arguments.epochs, arguments.max_error, arguments.images))
            print(json.dumps(runs[-1]), flush=True)
    record: dict[str, Any] = {"machine": describe_machine(), "torch": torch.__version__}
    record |= {"epochs": arguments.epochs, "max_error": arguments.max_error, "images": arguments.images}
    record |= {"runs": runs, "bars": [compare(runs)._asdict()]}
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["bars"]), f"written to {arguments.output}", sep="\n")


def run(kind: str, seed: int, epochs: int, max_error: float, count: int) -> dict[str, Any]:
    """One training: test accuracy and seconds."""
    torch.manual_seed(seed)
    model = SmallResNet()
    swapped = replace_activations(model, max_error) if kind == "interpolated" else {}
    images, labels = load("train")
    started = time.perf_counter()
    train(model, images[:count], labels[:count], epochs, RATE, seed)
    seconds = time.perf_counter() - started
    found = accuracy(model, *load("t10k"))
    return {
        "kind": kind,
        "seed": seed,
        "accuracy": found,
        "swapped": len(swapped),
        "seconds": round(seconds, 1),
    }


def compare(runs: list[dict[str, Any]]) -> Bar:
    """The mean accuracy lost by interpolation, relative to the exact layers' mean."""
    mean = {
        kind: statistics.fmean(r["accuracy"] for r in runs if r["kind"] == kind)
        for kind in ("exact", "interpolated")
    }
    loss = 1 - mean["interpolated"] / mean["exact"]
    what = f"relative loss of mean accuracy, {mean['interpolated']:.4f} against {mean['exact']:.4f}"
    return Bar(what, round(loss, 5), f"<= {MAX_LOSS}", loss <= MAX_LOSS)


if __name__ == "__main__":
    main()
