"""DenseNet-121 (Huang et al., "Densely Connected Convolutional Networks", CVPR 2017, table 1), random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.random_weights import calibration, input_shapes, onnx_file

__all__ = ["NAME", "calibration", "input_shapes", "onnx_path"]
NAME = "densenet121"
_LAYERS, _GROWTH = (6, 12, 24, 16), 32


def onnx_path() -> Path:
    """Path of the file, made when missing."""
    return onnx_file(NAME, _network)


def _network() -> Any:
    import torch
    from torch import nn

    def layer(channels: int, out: int, kernel: int) -> list:
        conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight)
        return [nn.BatchNorm2d(channels), nn.ReLU(), conv]

    class Dense(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.new = nn.Sequential(*layer(channels, 4 * _GROWTH, 1), *layer(4 * _GROWTH, _GROWTH, 3))

        def forward(self, x):
            return torch.cat([x, self.new(x)], 1)

    layers: list = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    channels = 64
    for block, count in enumerate(_LAYERS):
        if block:
            layers += [*layer(channels, channels // 2, 1), nn.AvgPool2d(2)]
            channels //= 2
        for _ in range(count):
            layers.append(Dense(channels))
            channels += _GROWTH
    end = [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *end, nn.Linear(channels, 1000))
