"""The small ResNet of ``fashion_mnist``, trained here in float32 and kept as ONNX, scored on the 10,000 test images.

It has SiLU after every convolution, written as Sigmoid and Mul. Needs the extra torch.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path

import numpy as np
import torch

from zoo import fetch
from zoo.fashion_mnist import EVALUATED, SmallResNet, load, train
from zoo.task import Run, Task, mean_of

NAME = "fashion_resnet"
SEED, EPOCHS, RATE = 1, 4, 0.2
SCORED, QUICK = 10_000, 1000


def onnx_path(seed: int = SEED) -> Path:
    """Path of the ONNX file in the cache; trained for a minute or two when missing."""
    path = fetch.cache_dir("files", NAME) / f"seed{seed}-epochs{EPOCHS}.onnx"
    if not path.exists():
        torch.manual_seed(seed)
        model = SmallResNet()
        train(model, *load("train"), EPOCHS, RATE, seed)
        stream = io.BytesIO()
        names = {"input_names": ["image"], "output_names": ["logits"]}
        # dynamo=True would need the package onnxscript.
        torch.onnx.export(model, (torch.zeros(EVALUATED, 1, 28, 28),), stream, dynamo=False, **names)
        fetch.write_atomically(path, stream.getvalue())
    return path


def input_shapes() -> dict[str, tuple[int, ...]]:
    """A batch of images."""
    return {"image": (EVALUATED, 1, 28, 28)}


@functools.cache
def _test_set() -> tuple[np.ndarray, np.ndarray]:
    images, labels = load("t10k")
    return images.numpy(), labels.numpy()


def calibration(n: int) -> list[dict[str, np.ndarray]]:
    """Batches of the training set."""
    images = load("train")[0].numpy()
    return [{"image": images[i * EVALUATED : (i + 1) * EVALUATED]} for i in range(n)]


def probes(quick: bool = False) -> list[dict[str, np.ndarray]]:
    """The first batches of the test set."""
    return [{"image": _test_set()[0][i * EVALUATED : (i + 1) * EVALUATED]} for i in range(1 if quick else 10)]


def _hits(count: int, run: Run) -> np.ndarray:
    images, labels = (part[:count] for part in _test_set())
    batches = range(0, count, EVALUATED)
    logits = np.concatenate([run({"image": images[i : i + EVALUATED]})[0] for i in batches])
    return logits.argmax(1) == labels


def tasks(quick: bool = False) -> list[Task]:
    """Top-1 accuracy."""
    count = QUICK if quick else SCORED
    return [Task("test_images", "top-1", count, functools.partial(_hits, count), mean_of)]
