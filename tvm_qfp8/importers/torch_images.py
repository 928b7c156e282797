"""Decompositions of pooling, grids and interpolation where TVM's front end differs from torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def adaptive_max_pool2d(x: Any, size: list[int]) -> Any:
    import torch

    if any(extent % out for extent, out in zip(x.shape[-2:], size, strict=True)):
        return NotImplemented
    kernel = [extent // out for extent, out in zip(x.shape[-2:], size, strict=True)]
    return torch.ops.aten.max_pool2d_with_indices(x, kernel, kernel)


def avg_pool2d(
    x: Any, kernel: list[int], stride: Any = (), padding: Any = 0, ceil: bool = False, pad: bool = True,
    divisor: int | None = None,
) -> Any:  # fmt: skip
    """Sums divided by a number of the caller's."""
    import torch

    if divisor is None:
        return NotImplemented
    size = kernel * 2 if len(kernel) == 1 else kernel
    pooled = torch.nn.functional.avg_pool2d(x, kernel, stride or None, padding, ceil, True)
    return pooled * (math.prod(size) / divisor)


def affine_grid(theta: Any, size: list[int], align_corners: bool) -> Any:
    """Not a matrix product, whose operands would be quantized: coordinates need float32."""
    import torch

    sizes = size[:1:-1]  # x, y (and z) count from the last dimension
    grid = theta[:, :, -1].reshape(-1, *[1] * len(sizes), len(sizes))
    for number, extent in enumerate(sizes):
        edge = (1.0 if align_corners else 1 - 1 / extent) if extent > 1 else 0.0
        axis = torch.linspace(-edge, edge, extent).reshape(-1, *[1] * (number + 1))
        grid = grid + axis * theta[:, :, number].reshape(-1, *[1] * len(sizes), len(sizes))
    return grid


def upsample(fallback: Callable) -> Callable:
    """TVM's resize takes its scale from the sizes, torch from the caller where he gave one.

    The nearest pixel TVM finds by rounding centers, torch by flooring: the same only for whole multiples.
    """

    def upsample(x: Any, size: Any, *given: Any) -> Any:
        *corners, scales = given  # the nearest pixel has no corners to align
        sizes = x.shape[2:]
        out = size or [int(extent * scale) for extent, scale in zip(sizes, scales, strict=True)]
        if corners:
            right = (
                corners[0]
                or scales is None
                or all(e * f == s for e, f, s in zip(sizes, scales, out, strict=True))
            )
        else:
            right = all(s % e == 0 for e, s in zip(sizes, out, strict=True))
        return NotImplemented if right else fallback(x, size, *given)

    return upsample
