"""Convolutions and pooling in NumPy: float32, channels last inside, any layout outside.

A convolution is a matmul of patches (a 1x1 one needs no patches), a depthwise one is a sum of shifted
products; both work on a few output rows at a time so that what they touch stays in cache.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

_BLOCK_BYTES = 1 << 20  # temporary of one block of rows: about a core's level-2 cache


def _to(array: np.ndarray, layout: str, wanted: str) -> np.ndarray:
    return array if layout == wanted else array.transpose([layout.index(axis) for axis in wanted])


def _pad(x: np.ndarray, padding: tuple[int, ...], value: float = 0.0) -> np.ndarray:
    top, left, bottom, right = padding
    if not any(padding):
        return x
    n, h, w, c = x.shape
    out = np.full((n, h + top + bottom, w + left + right, c), value, x.dtype)
    out[:, top : top + h, left : left + w] = x
    return out


def _windows(x: np.ndarray, kernel: tuple[int, int], strides: tuple, dilation: tuple) -> np.ndarray:
    """View ``(n, out_h, out_w, kernel_h, kernel_w, c)`` of an already padded NHWC array."""
    (kh, kw), (sh, sw), (dh, dw) = kernel, strides, dilation
    n, h, w, c = x.shape
    out_h, out_w = (h - (kh - 1) * dh - 1) // sh + 1, (w - (kw - 1) * dw - 1) // sw + 1
    bn, bh, bw, bc = x.strides
    return np.lib.stride_tricks.as_strided(
        x, (n, out_h, out_w, kh, kw, c), (bn, bh * sh, bw * sw, bh * dh, bw * dw, bc), writeable=False
    )


def _rows(out_h: int, row_bytes: int) -> list[slice]:
    step = max(1, _BLOCK_BYTES // max(1, row_bytes))
    return [slice(start, min(out_h, start + step)) for start in range(0, out_h, step)]


def _depthwise(windows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Sum of shifted products; ``weight`` is ``(kernel_h, kernel_w, channels)``."""
    n, out_h, out_w, kh, kw, c = windows.shape
    out = np.empty((n, out_h, out_w, c), np.float32)
    for image in range(n):
        for rows in _rows(out_h, 3 * 4 * out_w * c):
            total = out[image, rows]
            view = windows[image, rows]
            np.multiply(view[:, :, 0, 0], weight[0, 0], out=total)
            product = np.empty_like(total)
            for tap in range(1, kh * kw):
                i, j = divmod(tap, kw)
                np.multiply(view[:, :, i, j], weight[i, j], out=product)
                total += product
    return out


def _dense(windows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Patches times ``weight`` of shape ``(kernel_h * kernel_w * in_channels, out_channels)``."""
    n, out_h, out_w, kh, kw, c = windows.shape
    out = np.empty((n, out_h, out_w, weight.shape[1]), np.float32)
    for image in range(n):
        for rows in _rows(out_h, 4 * out_w * kh * kw * c):
            patches = windows[image, rows].reshape(-1, kh * kw * c)
            np.matmul(patches, weight, out=out[image, rows].reshape(-1, weight.shape[1]))
    return out


def input_windows(attrs: SimpleNamespace, x: np.ndarray, kernel: tuple[int, int]) -> np.ndarray:
    """What each output pixel of a ``conv2d`` reads, ``(n, out_h, out_w, kernel_h, kernel_w, channels)``, a view."""
    padded = _pad(_to(x, attrs.data_layout, "NHWC"), attrs.padding)
    return _windows(padded, kernel, attrs.strides, attrs.dilation)


def conv2d(attrs: SimpleNamespace, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """``relax.nn.conv2d`` for every layout, stride, padding, dilation and number of groups."""
    w = _to(weight, attrs.kernel_layout, "OHWI")
    x = _pad(_to(x, attrs.data_layout, "NHWC"), attrs.padding)
    out_channels, kh, kw, _ = w.shape
    channels, groups = x.shape[3], attrs.groups
    if groups == channels:
        if out_channels != channels:
            x = np.repeat(x, out_channels // channels, axis=3)
        view = _windows(x, (kh, kw), attrs.strides, attrs.dilation)
        y = _depthwise(view, np.ascontiguousarray(w[..., 0].transpose(1, 2, 0)))
    else:
        view = _windows(x, (kh, kw), attrs.strides, attrs.dilation)
        parts = []
        for g in range(groups):
            part = w[g * out_channels // groups : (g + 1) * out_channels // groups]
            some = view[..., g * channels // groups : (g + 1) * channels // groups]
            parts.append(_dense(some, part.reshape(len(part), -1).T))
        y = parts[0] if groups == 1 else np.concatenate(parts, axis=3)
    return _to(y, "NHWC", attrs.out_layout)


def conv2d_transpose(attrs: SimpleNamespace, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """``relax.nn.conv2d_transpose``: one matmul, then its taps added at their strided places."""
    w = _to(weight, attrs.kernel_layout, "IHWO")
    x = np.ascontiguousarray(_to(x, attrs.data_layout, "NHWC"))
    (sh, sw), (dh, dw), (oh, ow) = attrs.strides, attrs.dilation, attrs.output_padding
    top, left, bottom, right = attrs.padding
    n, h, width, c = x.shape
    groups, (_, kh, kw, per_group) = attrs.groups, w.shape
    full_h, full_w = (h - 1) * sh + (kh - 1) * dh + 1 + oh, (width - 1) * sw + (kw - 1) * dw + 1 + ow
    y = np.zeros((n, full_h, full_w, groups * per_group), np.float32)
    for g in range(groups):
        inputs = slice(g * c // groups, (g + 1) * c // groups)
        outputs = slice(g * per_group, (g + 1) * per_group)
        taps = x[..., inputs].reshape(-1, c // groups) @ w[inputs].reshape(c // groups, -1)
        taps = taps.reshape(n, h, width, kh, kw, per_group)
        for i in range(kh):
            for j in range(kw):
                rows = slice(i * dh, i * dh + (h - 1) * sh + 1, sh)
                columns = slice(j * dw, j * dw + (width - 1) * sw + 1, sw)
                y[:, rows, columns, outputs] += taps[:, :, :, i, j]
    return _to(y[:, top : full_h - bottom, left : full_w - right], "NHWC", attrs.out_layout)


def _pool_windows(attrs: SimpleNamespace, x: np.ndarray, value: float) -> np.ndarray:
    """Windows of a padded NHWC array; ``ceil_mode`` is padding that lets the last window run over."""
    padding = list(attrs.padding)
    if attrs.ceil_mode:
        for axis in (0, 1):
            extent = x.shape[1 + axis] + padding[axis] + padding[2 + axis]
            extent -= (attrs.pool_size[axis] - 1) * attrs.dilation[axis] + 1
            padding[2 + axis] += -extent % attrs.strides[axis]
    return _windows(_pad(x, tuple(padding), value), attrs.pool_size, attrs.strides, attrs.dilation)


def max_pool2d(attrs: SimpleNamespace, x: np.ndarray) -> np.ndarray:
    """``relax.nn.max_pool2d``."""
    view = _pool_windows(attrs, _to(x, attrs.layout, "NHWC"), -np.inf)
    y = view[:, :, :, 0, 0].copy()
    for tap in range(1, view.shape[3] * view.shape[4]):
        np.maximum(y, view[(..., *divmod(tap, view.shape[4]), slice(None))], out=y)
    return _to(y, "NHWC", attrs.out_layout)


def avg_pool2d(attrs: SimpleNamespace, x: np.ndarray) -> np.ndarray:
    """``relax.nn.avg_pool2d``; padding counts as zeros or not at all (``count_include_pad``)."""
    x = _to(x, attrs.layout, "NHWC")
    y = _pool_windows(attrs, x, 0.0).sum(axis=(3, 4), dtype=np.float32)
    ones = np.ones((1, *x.shape[1:3], 1), np.float32)
    if attrs.count_include_pad:
        top, left, bottom, right = attrs.padding
        ones = np.ones((1, x.shape[1] + top + bottom, x.shape[2] + left + right, 1), np.float32)
        attrs = SimpleNamespace(**{**vars(attrs), "padding": (0, 0, 0, 0)})
    count = _pool_windows(attrs, ones, 0.0).sum(axis=(3, 4))
    return _to(y / count, "NHWC", attrs.out_layout)


def adaptive_avg_pool2d(attrs: SimpleNamespace, x: np.ndarray) -> np.ndarray:
    """``relax.nn.adaptive_avg_pool2d``: output cell i averages rows floor(i*H/n) to ceil((i+1)*H/n)."""
    x = _to(x, attrs.layout, "NHWC")
    out_h, out_w = attrs.output_size if attrs.output_size is not None else x.shape[1:3]
    y = np.empty((x.shape[0], out_h, out_w, x.shape[3]), np.float32)
    for i in range(out_h):
        for j in range(out_w):
            rows = slice(i * x.shape[1] // out_h, -(-(i + 1) * x.shape[1] // out_h))
            columns = slice(j * x.shape[2] // out_w, -(-(j + 1) * x.shape[2] // out_w))
            y[:, i, j] = x[:, rows, columns].mean(axis=(1, 2))
    return _to(y, "NHWC", attrs.out_layout)
