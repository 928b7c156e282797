"""Shapes of ResNet-18 and -50, MobileNetV2, MiniLM and BERT-base, one layer kind a family.

onnxruntime reorders a float32 convolution's tensors on entering and leaving a graph. In a network that happens once,
so convolutions are timed as chains of ``layers`` equal ones (pointwise: alternately wider and narrower), and the
figure is a layer's share.
"""

from __future__ import annotations

from dataclasses import dataclass

TOKENS = 128


@dataclass(frozen=True)
class Dense:
    """``layers`` products of ``(rows, depth)`` by ``(depth, columns)``, each with its own weights."""

    rows: int
    depth: int
    columns: int
    layers: int = 1

    @property
    def name(self) -> str:
        rotation = f", {self.layers} in rotation" if self.layers > 1 else ""
        return f"{self.rows}x{self.depth}x{self.columns}{rotation}"

    @property
    def macs(self) -> int:
        return self.rows * self.depth * self.columns


@dataclass(frozen=True)
class Convolution:
    """``layers`` convolutions over ``size x size`` pixels, from ``channels`` to ``wide`` channels and back."""

    size: int
    channels: int
    wide: int
    kernel: int
    layers: int
    stride: int = 1
    depthwise: bool = False
    dilation: int = 1

    @property
    def name(self) -> str:
        channels = f"{self.channels}" if self.channels == self.wide else f"{self.channels}-{self.wide}"
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        dilation = f" dilation {self.dilation}" if self.dilation > 1 else ""
        return f"{self.size}x{self.size}x{channels}{stride}{dilation}"

    @property
    def groups(self) -> int:
        return self.channels if self.depthwise else 1

    @property
    def padding(self) -> int:
        return self.kernel // 2 * self.dilation

    @property
    def macs(self) -> int:
        """Of one layer, by the direct form."""
        out = -(-self.size // self.stride)
        return out * out * self.kernel**2 * self.channels * self.wide // self.groups

    def layer_channels(self, index: int) -> tuple[int, int]:
        """(in, out) of a layer."""
        return (self.channels, self.wide) if index % 2 == 0 else (self.wide, self.channels)


Case = Dense | Convolution


def _pointwise(size: int, channels: int, wide: int) -> Convolution:
    return Convolution(size, channels, wide, kernel=1, layers=4)


def _depthwise(size: int, channels: int, stride: int = 1) -> Convolution:
    return Convolution(size, channels, channels, 3, 4 if stride == 1 else 1, stride, depthwise=True)


FAMILIES: dict[str, list[Case]] = {
    "gemm": [
        # MiniLM, BERT-base: projections and both halves of the feed-forward layer
        *(Dense(TOKENS, *shape) for shape in ((384, 384), (384, 1536), (1536, 384))),
        *(Dense(TOKENS, *shape) for shape in ((768, 768), (768, 3072), (3072, 768))),
        # ResNet-50
        *(_pointwise(*shape) for shape in ((56, 64, 64), (56, 64, 256), (28, 128, 512), (14, 256, 1024))),
        _pointwise(7, 512, 2048),
        # MobileNetV2
        *(_pointwise(*shape) for shape in ((112, 16, 96), (56, 24, 144), (28, 32, 192), (14, 64, 384))),
        *(_pointwise(*shape) for shape in ((14, 96, 576), (7, 160, 960), (7, 320, 1280))),
    ],
    "conv3x3": [Convolution(s, c, c, 3, layers=3) for s, c in ((56, 64), (28, 128), (14, 256), (7, 512))],
    "gemv": [Dense(1, 4096, 4096), Dense(1, 4096, 4096, layers=8), Dense(1, 1024, 1024)],
    "depthwise": [
        *(_depthwise(*shape) for shape in ((112, 32), (56, 144), (28, 192), (14, 384), (14, 576), (7, 960))),
        *(_depthwise(*shape, stride=2) for shape in ((112, 96), (56, 144), (28, 192), (14, 576))),
    ],
}
