"""Fashion-MNIST (Xiao et al., 2017) from Debian's package, a small ResNet for it, and an ordinary training loop."""

from __future__ import annotations

import gzip

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from zoo.fetch import unpacked_deb

FOLDER = "usr/share/datasets/fashion-mnist"
MEAN, DEVIATION = 0.2860, 0.3530
CLASSES = 10
BATCH = 128
EVALUATED = 100
"""Images of a batch without gradients: exact sums of trained 8-bit layers take float64 arrays, best kept in cache."""
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


def load(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images float32 ``(n, 1, 28, 28)``, normalized, and labels int64 of ``part``, "train" or "t10k"."""
    folder = unpacked_deb("dataset-fashion-mnist") / FOLDER
    pixels = np.frombuffer(
        gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8
    )
    labels = np.frombuffer(
        gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8
    )
    images = (pixels.reshape(-1, 1, 28, 28).astype(np.float32) / 255 - MEAN) / DEVIATION
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


class Residual(nn.Module):
    """Two 3x3 convolutions with BatchNorm beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.SiLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.act2 = nn.SiLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        return self.act2(y + self.shortcut(x))


class SmallResNet(nn.Module):
    """A ResNet of seven convolutions with BatchNorm and SiLU, 28 x 28 images to logits."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.SiLU())
        self.blocks = nn.Sequential(
            Residual(width, width, 1), Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2)
        )
        self.head = nn.Linear(4 * width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def train(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, rate: float, seed: int
) -> None:
    """SGD with momentum, one cycle of the learning rate up to ``rate``, order of the images by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), rate, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for batch in order[: len(order) // BATCH * BATCH].split(BATCH):
            loss = functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of images whose largest logit is the label's."""
    with torch.inference_mode():
        hits = sum(
            int((model(x).argmax(1) == y).sum())
            for x, y in zip(images.split(EVALUATED), labels.split(EVALUATED), strict=True)
        )
    return hits / len(images)
