"""NumPy twins of the kernels: slow, short, and equal to the kernels bit for bit.

Integer parts are computed in int64; float parts follow the float contract (``float_contract.py``): every operation
rounds to float32, sums of rows go to 16 lanes and are combined in the tree 8-4-2-1, those of linear layers are fused
multiply-adds in order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from tvm_qfp8.format import Layout, decode_grid, encode
from tvm_qfp8.topi.batch_matmul import BatchMatmulShape
from tvm_qfp8.topi.conv2d import ConvShape
from tvm_qfp8.topi.float_contract import LANES, LOWEST, SMALLEST_SUM
from tvm_qfp8.topi.resize import ResizeShape
from tvm_qfp8.topi.rotation import rotated
from tvm_qfp8.topi.winograd_tiling import Tiling

Array = np.ndarray


def lane_sum(values: Array) -> Array:
    """Sum of float32 values over the last axis in 16 lanes and the tree 8-4-2-1."""
    length = values.shape[-1]
    groups = -(-length // LANES)
    padded = np.zeros((*values.shape[:-1], groups * LANES), np.float32)
    padded[..., :length] = values
    parts = padded.reshape(*values.shape[:-1], groups, LANES)
    lanes = np.zeros((*values.shape[:-1], LANES), np.float32)
    for group in range(groups):
        lanes = lanes + parts[..., group, :]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """fl32(a * b + c), rounded once (reason and source: ``float_contract.fused_multiply_add_in_float64``)."""
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = np.asarray(product + c)
    with np.errstate(invalid="ignore"):
        added = total - product
        error = (product - (total - added)) + (c - added)
    pattern = total.view(np.int64)
    inexact = (error < 0) | (error > 0)
    away = np.where((error < 0) == (total < 0), 1, -1)
    odd = np.where(inexact & (pattern % 2 == 0), pattern + away, pattern)
    with np.errstate(over="ignore"):
        return odd.view(np.float64).astype(np.float32)


def scale_and_bias(accumulators: Array, a: Array, bias: Array, row_scales: Array | None = None) -> Array:
    """fl32(fl32(acc) * a[c]) [* s[row]] + bias[c] over the last axis; ``row_scales`` broadcast over the others."""
    scaled = accumulators.astype(np.float32) * a.astype(np.float32)
    if row_scales is not None:
        scaled = scaled * row_scales[..., None]
    return scaled + bias.astype(np.float32)


def encode_rows(
    x: Array, layout: Layout, factors: Array | None = None, rotation: int = 1
) -> tuple[Array, Array]:
    """Codes of ``x (..., channels)`` and the scale of each row, float32 ``(...,)`` (``encode_rows.py``)."""
    values = rotated(x if factors is None else x * factors, rotation)
    limits = np.finfo(np.float32)
    largest = np.minimum(np.abs(values).max(axis=-1, initial=0.0), limits.max)
    inverse = np.float32(1) / np.float32(layout.max_grid)
    scales = np.maximum(largest * inverse, limits.tiny)
    with np.errstate(over="ignore"):
        return encode(values * (np.float32(1) / scales)[..., None], 1.0, layout), scales


def encode_samples(x: Array, layout: Layout) -> tuple[Array, Array]:
    """Codes of ``x (samples, ...)`` and the scale of each sample, float32 ``(samples,)`` (``encode_samples.py``)."""
    codes, scales = encode_rows(x.reshape(len(x), math.prod(x.shape[1:])), layout)
    return codes.reshape(x.shape), scales


def matmul(x: Array, weight: Array, x_layout: Layout, weight_layout: Layout) -> Array:
    """Exact sums of codes ``(..., in)`` by codes ``(out, in)``, int64 ``(..., out)``."""
    return decode_grid(x, x_layout).astype(np.int64) @ decode_grid(weight, weight_layout).astype(np.int64).T


def conv2d(x: Array, weight: Array, shape: ConvShape) -> Array:
    """Exact sums of NHWC codes by OHWI codes, int64 ``(batch, out_height, out_width, out_channels)``."""
    activation, layout = shape.layouts()
    grid = decode_grid(x, activation).astype(np.int64)
    weights = decode_grid(weight, layout).astype(np.int64)
    out = np.zeros((shape.batch, shape.out_height, shape.out_width, shape.out_channels), np.int64)
    inputs, outputs = shape.channels // shape.groups, shape.out_channels // shape.groups
    for kh, kw, window in _windows(grid, shape):
        for group in range(shape.groups):
            o = slice(group * outputs, (group + 1) * outputs)
            out[..., o] += window[..., group * inputs : (group + 1) * inputs] @ weights[o, kh, kw].T
    return out


def _windows(x: Array, shape: ConvShape) -> Iterator[tuple[int, int, Array]]:
    """(kh, kw, what that tap of the filter meets at each output pixel)."""
    top, left, bottom, right = shape.padding
    spread_h, spread_w = shape.input_dilation
    slab = np.zeros((shape.batch, shape.slab_height, shape.slab_width, shape.channels), x.dtype)
    slab[:, top : shape.slab_height - bottom : spread_h, left : shape.slab_width - right : spread_w] = x
    for kh in range(shape.kernel[0]):
        for kw in range(shape.kernel[1]):
            y, x_at = kh * shape.dilation[0], kw * shape.dilation[1]
            rows = slice(y, y + (shape.out_height - 1) * shape.stride[0] + 1, shape.stride[0])
            columns = slice(x_at, x_at + (shape.out_width - 1) * shape.stride[1] + 1, shape.stride[1])
            yield kh, kw, slab[:, rows, columns]


def float_matmul(x: Array, weight: Array) -> Array:
    """float32 ``(..., in)`` by ``(out, in)``, added in order (``isa/floats.py``)."""
    total = np.zeros((*x.shape[:-1], len(weight)), np.float32)
    for k in range(x.shape[-1]):
        total = fused_multiply_add(x[..., k, None], weight[:, k], total)
    return total


def float_conv2d(x: Array, weight: Array, shape: ConvShape) -> Array:
    """float32 NHWC by OHWI, taps row by row, in each the channels in order (``isa/floats.py``)."""
    out = np.zeros((shape.batch, shape.out_height, shape.out_width, shape.out_channels), np.float32)
    inputs, outputs = shape.channels // shape.groups, shape.out_channels // shape.groups
    for kh, kw, window in _windows(x, shape):
        for group in range(shape.groups):
            o = slice(group * outputs, (group + 1) * outputs)
            for channel in range(inputs):
                values = window[..., group * inputs + channel, None]
                out[..., o] = fused_multiply_add(values, weight[o, kh, kw, channel], out[..., o])
    return out


def winograd_conv2d(x: Array, weight: Array, shape: ConvShape, tiling: Tiling) -> Array:
    """The sums of ``conv2d`` by Winograd's algorithm, int64; only for 3x3 filters with stride 1."""
    activation, layout = shape.layouts()
    top, left, bottom, right = shape.padding
    step_h, step_w = shape.dilation
    if (step_h, step_w) != (1, 1):
        x = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
        out = np.empty((shape.batch, shape.out_height, shape.out_width, shape.out_channels), np.int64)
        for row, column in np.ndindex(step_h, step_w):
            part = x[:, row::step_h, column::step_w]
            height, width = part.shape[1:3]
            one = replace(shape, height=height, width=width, padding=(0, 0, 0, 0), dilation=(1, 1))
            out[:, row::step_h, column::step_w] = winograd_conv2d(part, weight, one, tiling)
        return out
    step = tiling.outputs
    padding = (
        (0, 0),
        (top, bottom - shape.out_height % -step),
        (left, right - shape.out_width % -step),
        (0, 0),
    )
    slab = np.pad(decode_grid(x, activation).astype(np.int64), padding)
    window = (tiling.window, tiling.window)
    windows = np.lib.stride_tricks.sliding_window_view(slab, window, axis=(1, 2))[:, ::step, ::step]
    inputs = tiling.B_T @ windows @ tiling.B_T.T
    filters = tiling.transform_filters(decode_grid(weight, layout).astype(np.int64).transpose(0, 3, 1, 2))
    products = np.einsum("byxcij,ocij->byxoij", inputs, filters, optimize=True)
    tiles = tiling.A_T @ products @ tiling.A_T.T
    assert not (tiles % tiling.divisor).any()
    batch, high, wide, out_channels = tiles.shape[:4]
    pixels = (
        (tiles // tiling.divisor)
        .transpose(0, 1, 4, 2, 5, 3)
        .reshape(batch, step * high, step * wide, out_channels)
    )
    return pixels[:, : shape.out_height, : shape.out_width]


def batch_matmul(x: Array, y: Array, shape: BatchMatmulShape) -> Array:
    """Float32 sums of two activations: int32 blocks of ``shape.block_depth``, added in order."""
    assert shape.x is not None and shape.y is not None
    a, b = decode_grid(x, shape.x).astype(np.int64), decode_grid(y, shape.y).astype(np.int64)
    b = b.swapaxes(-1, -2) if shape.transpose_y else b
    if shape.depth <= shape.block_depth:
        return (a @ b).astype(np.float32)
    total = np.zeros((*a.shape[:-1], b.shape[-1]), np.float32)
    for start in range(0, shape.depth, shape.block_depth):
        part = slice(start, start + shape.block_depth)
        total = total + (a[..., part] @ b[..., part, :]).astype(np.float32)
    return total


def layer_norm(x: Array, gamma: Array, beta: Array, epsilon: float) -> Array:
    """LayerNorm over the last axis with the kernel's order of operations."""
    inverse = np.float32(1.0 / x.shape[-1])
    centred = x - (lane_sum(x) * inverse)[..., None]
    variance = lane_sum(centred * centred) * inverse
    factor = np.float32(1.0) / np.sqrt(variance + np.float32(epsilon))
    return (centred * factor[..., None]) * gamma + beta


def group_norm(x: Array, groups: int, epsilon: float) -> Array:
    """GroupNorm of NHWC, without scale and shift, with the kernel's order of operations."""
    pixels = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)

    def mean(values: Array) -> Array:
        total = lane_sum(lane_sum(values.transpose(0, 2, 3, 1)))
        return (total * np.float32(1.0 / (values.shape[1] * values.shape[3])))[:, None, :, None]

    centred = pixels - mean(pixels)
    factor = np.float32(1.0) / np.sqrt(mean(centred * centred) + np.float32(epsilon))
    return (centred * factor).reshape(x.shape)


def rms_norm(x: Array, gamma: Array, epsilon: float) -> Array:
    """RMSNorm over the last axis with the kernel's order of operations."""
    square = lane_sum(x * x) * np.float32(1.0 / x.shape[-1])
    factor = np.float32(1.0) / np.sqrt(square + np.float32(epsilon))
    return (x * factor[..., None]) * gamma


def l2_normalize(x: Array, floor: float) -> Array:
    """x / max(|x|, floor) over the last axis with the kernel's order of operations."""
    factor = np.float32(1.0) / np.maximum(np.sqrt(lane_sum(x * x)), np.float32(floor))
    return x * factor[..., None]


def softmax(x: Array, exp) -> Array:
    """Softmax over the last axis with the table ``exp``; 0 for a row of only -infinity."""
    powers = exp(x - np.maximum(x.max(-1, keepdims=True), np.float32(LOWEST)))
    return powers * (np.float32(1.0) / np.maximum(lane_sum(powers), np.float32(SMALLEST_SUM)))[..., None]


def global_mean(x: Array) -> Array:
    """Mean over height and width of ``(batch, height, width, channels)``, ``(batch, channels)``."""
    pixels = x.reshape(x.shape[0], -1, x.shape[-1]).transpose(0, 2, 1)
    return lane_sum(pixels) * (np.float32(1.0) / np.float32(pixels.shape[-1]))


def resize_linear(x: Array, shape: ResizeShape) -> Array:
    """Images ``(outer, height, width, inner)`` to ``(outer, *shape.out, inner)``, along the columns first."""
    places, weights = shape.taps()
    rows = shape.out[0]

    def between(values: Array, axis: int, taps: slice) -> Array:
        left, right = (
            np.take(values, places[taps, side], axis)
            * weights[taps, side].reshape((-1,) + (1,) * (values.ndim - 1 - axis))
            for side in range(2)
        )
        return left + right

    return between(between(x, 2, slice(rows, None)), 1, slice(rows))
