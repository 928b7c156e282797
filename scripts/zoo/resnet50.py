"""ResNet-50 (He et al., "Deep Residual Learning", CVPR 2016, table 1; stride in the 3x3 layer), random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.random_weights import calibration, input_shapes, onnx_file

__all__ = ["NAME", "calibration", "input_shapes", "onnx_path"]
NAME = "resnet50"
_BLOCKS = (3, 4, 6, 3)


def onnx_path() -> Path:
    """Path of the file, made when missing."""
    return onnx_file(NAME, _network)


def _network() -> Any:
    from torch import nn

    def layer(channels: int, out: int, kernel: int, stride: int = 1) -> list:
        conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        return [conv, nn.BatchNorm2d(out)]

    class Bottleneck(nn.Module):
        def __init__(self, channels: int, width: int, stride: int) -> None:
            super().__init__()
            narrow = [*layer(channels, width, 1), nn.ReLU(), *layer(width, width, 3, stride), nn.ReLU()]
            self.block = nn.Sequential(*narrow, *layer(width, 4 * width, 1))
            straight = stride == 1 and channels == 4 * width
            self.shortcut = nn.Sequential(*([] if straight else layer(channels, 4 * width, 1, stride)))

        def forward(self, x):
            return nn.functional.relu(self.block(x) + self.shortcut(x))

    layers = [*layer(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, count in enumerate(_BLOCKS):
        width = 64 << stage
        for index in range(count):
            layers.append(Bottleneck(channels, width, 2 if stage and not index else 1))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))
