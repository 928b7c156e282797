"""Nonlinear functions in NumPy, float32 in and out, accurate to a few units in the last place."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np

# erf on [0, 4) in cells of 1/4096, lines between: the error is at most max|erf''| / 8 / 4096^2 < 1e-8,
# and 1 - erf(4) = 1.5e-8, both below half a unit in the last place of a float32 near 1.
_ERF_CELLS = 4096
_ERF_END = 4.0
_ERF = np.array([math.erf(i / _ERF_CELLS) for i in range(int(_ERF_END) * _ERF_CELLS + 2)])
_ERF_VALUE = _ERF[:-1].astype(np.float32)
_ERF_STEP = np.diff(_ERF).astype(np.float32)
_BLOCK = 1 << 15  # elements worked on at a time, so that temporaries stay in cache


def _erf_block(x: np.ndarray) -> np.ndarray:
    position = np.abs(x)
    np.fmin(position, np.float32(_ERF_END), out=position)
    position *= np.float32(_ERF_CELLS)
    cell = position.astype(np.int32)
    position -= cell
    position *= _ERF_STEP[cell]
    position += _ERF_VALUE[cell]
    np.copysign(position, x, out=position)
    np.copyto(position, x, where=np.isnan(x))
    return position


def erf(x: np.ndarray) -> np.ndarray:
    """Error function; absolute error below 2e-7."""
    x = np.asarray(x, np.float32)
    flat = np.ascontiguousarray(x).reshape(-1)
    out = np.empty_like(flat)
    for start in range(0, flat.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        out[part] = _erf_block(flat[part])
    return out.reshape(x.shape)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)); exp may overflow to infinity, which gives the right 0."""
    with np.errstate(over="ignore"):
        out = np.exp(-x)
    out += 1
    return np.reciprocal(out)


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def gelu(x: np.ndarray) -> np.ndarray:
    """x * (1 + erf(x / sqrt(2))) / 2."""
    out = erf(x * np.float32(math.sqrt(0.5)))
    out += 1
    out *= x
    out *= np.float32(0.5)
    return out


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))) / 2."""
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (1 + np.tanh(inner))


def softplus(x: np.ndarray, beta: float, threshold: float) -> np.ndarray:
    """log(1 + exp(beta x)) / beta, and x itself where beta x is above the threshold."""
    scaled = x * np.float32(beta)
    smooth = np.log1p(np.exp(np.minimum(scaled, np.float32(threshold)))) / np.float32(beta)
    return np.where(scaled > threshold, x, smooth)


def prelu(x: np.ndarray, slope: np.ndarray, axis: int) -> np.ndarray:
    """x where positive, else slope * x; one slope per channel of ``axis``."""
    shape = [1] * x.ndim
    shape[axis] = -1
    return np.where(x > 0, x, x * slope.reshape(shape))


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    """exp(x) / sum(exp(x)), shifted by the maximum; 0 where all are -infinity, as in the kernels."""
    out = np.exp(_below_largest(x, axis))
    total = out.sum(axis=axis, keepdims=True)
    out /= np.where(total == 0, np.float32(1), total)
    return out


def log_softmax(x: np.ndarray, axis: int) -> np.ndarray:
    """Logarithm of softmax."""
    shifted = _below_largest(x, axis)
    total = np.exp(shifted).sum(axis=axis, keepdims=True)
    return shifted - np.log(np.where(total == 0, np.float32(1), total))


def _below_largest(x: np.ndarray, axis: int) -> np.ndarray:
    """x less its greatest value, which is taken for the least finite one where all are -infinity."""
    return x - np.maximum(x.max(axis=axis, keepdims=True), np.finfo(np.float32).min)


def _over_axes(x: np.ndarray, axes: tuple[int, ...], vector: np.ndarray) -> np.ndarray:
    """``vector``, whose shape is that of ``x`` at ``axes``, broadcastable to ``x``."""
    normal = {axis % x.ndim for axis in axes}
    return vector.reshape([extent if i in normal else 1 for i, extent in enumerate(x.shape)])


def _standardized(x: np.ndarray, axes: tuple[int, ...], epsilon: float) -> np.ndarray:
    """(x - mean) / sqrt(variance + epsilon) over ``axes``."""
    out = x - x.mean(axis=axes, keepdims=True)
    out /= np.sqrt(np.square(out).mean(axis=axes, keepdims=True) + np.float32(epsilon))
    return out


def _scaled(
    attrs: SimpleNamespace, out: np.ndarray, axes: tuple[int, ...], gamma: np.ndarray, beta: np.ndarray
) -> np.ndarray:
    """``out`` with the scale and the shift that ``attrs`` ask for, which lie along ``axes``; in place."""
    if attrs.scale:
        out *= _over_axes(out, axes, gamma)
    if attrs.center:
        out += _over_axes(out, axes, beta)
    return out


def layer_norm(attrs: SimpleNamespace, x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta over ``attrs.axes``."""
    axes = tuple(attrs.axes)
    return _scaled(attrs, _standardized(x, axes, attrs.epsilon), axes, gamma, beta)


def instance_norm(attrs: SimpleNamespace, x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """(x - mean) / sqrt(variance + epsilon) over ``attrs.axes``, scale and shift for each channel."""
    out = _standardized(x, tuple(attrs.axes), attrs.epsilon)
    return _scaled(attrs, out, (attrs.channel_axis,), gamma, beta)


def group_norm(attrs: SimpleNamespace, x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """(x - mean) / sqrt(variance + epsilon) over ``attrs.axes`` and the channels of each group."""
    channel, groups = attrs.channel_axis % x.ndim, attrs.num_groups
    shape = (*x.shape[:channel], groups, x.shape[channel] // groups, *x.shape[channel + 1 :])
    axes = [axis + (axis > channel) for axis in (axis % x.ndim for axis in attrs.axes)]
    out = _standardized(x.reshape(shape), (*axes, channel + 1), attrs.epsilon).reshape(x.shape)
    return _scaled(attrs, out, (channel,), gamma, beta)


def rms_norm(attrs: SimpleNamespace, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x / sqrt(mean(x^2) + epsilon) * weight over ``attrs.axes``."""
    axes = tuple(attrs.axes)
    scale = np.sqrt(np.square(x).mean(axis=axes, keepdims=True) + np.float32(attrs.epsilon))
    return x / scale * _over_axes(x, axes, weight)


def l2_normalize(x: np.ndarray, floor: float, axis: int) -> np.ndarray:
    """x / max(sqrt(sum(x^2)), floor) over an axis."""
    length = np.sqrt(np.square(x).sum(axis=axis, keepdims=True))
    return x / np.maximum(length, x.dtype.type(floor))
