"""NumPy twins of the Relax operators that a canonical module holds.

``TABLE`` maps an operator's name to ``function(attrs, *arguments)``: ``attrs`` has the call's attributes as
plain Python values and, as ``result``, the shape and dtype of its value; arguments are arrays, numbers,
shapes or tuples of these. float32 stays float32.
What is not in the table is compiled by TVM (see fallback.py), so the table holds what is common, not all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from tvm_qfp8.calibration import convolution, nonlinear, recurrent
from tvm_qfp8.tables.families import find_function

Attrs = SimpleNamespace
Operator = Callable[..., Any]


def _plain(function: Callable[..., Any]) -> Operator:
    """A NumPy function of the arguments alone."""
    return lambda attrs, *arguments: function(*arguments)


def _divide(a: Any, b: Any) -> Any:
    """Division as TVM does it: integers truncate towards zero."""
    if np.issubdtype(np.result_type(a, b), np.integer):
        quotient = np.abs(a) // np.abs(b)
        return np.where((np.asarray(a) < 0) != (np.asarray(b) < 0), -quotient, quotient)
    return np.divide(a, b)


def _reduction(function: Callable[..., Any]) -> Operator:
    def reduce(attrs: Attrs, x: np.ndarray) -> np.ndarray:
        axes = None if attrs.axis is None else tuple(attrs.axis)
        return np.asarray(function(x, axis=axes, keepdims=attrs.keepdims)).astype(x.dtype, copy=False)

    return reduce


def _argument(function: Callable[..., Any]) -> Operator:
    return lambda attrs, x: np.asarray(function(x, axis=attrs.axis, keepdims=attrs.keepdims), np.int64)


def _clip(attrs: Attrs, x: np.ndarray, low: Any, high: Any) -> np.ndarray:
    return np.minimum(np.maximum(x, x.dtype.type(low)), x.dtype.type(high))


def _reshape(attrs: Attrs, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return x.reshape(shape)


def _split(attrs: Attrs, x: np.ndarray) -> tuple[np.ndarray, ...]:
    where = attrs.indices_or_sections
    if not isinstance(where, int):
        return tuple(np.split(x, list(where), attrs.axis))
    step = -(-x.shape[attrs.axis] // where)  # a last part may be shorter, as in Relax
    return tuple(np.split(x, range(step, x.shape[attrs.axis], step), attrs.axis))


def _strided_slice(attrs: Attrs, x: np.ndarray, axes: Any, begin: Any, end: Any, strides: Any = None) -> Any:
    index: list[slice] = [slice(None)] * x.ndim
    for i, axis in enumerate(axes):
        step = 1 if strides is None else strides[i]
        stop = end[i]
        if step < 0 and stop < -x.shape[axis]:
            stop = None  # "before the first element", which a negative stop cannot say in NumPy
        index[axis] = slice(begin[i], stop, step)
    return x[tuple(index)]


_PAD_MODES: dict[str, Any] = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _pad(attrs: Attrs, x: np.ndarray) -> np.ndarray:
    widths = np.asarray(attrs.pad_width).reshape(-1, 2)
    if attrs.pad_mode == "constant":
        # A negative width takes elements away.
        cuts = zip(widths, x.shape, strict=True)
        kept = tuple(slice(max(-before, 0), extent - max(-after, 0)) for (before, after), extent in cuts)
        return np.pad(x[kept], np.maximum(widths, 0), constant_values=attrs.pad_value)
    return np.pad(x, widths, mode=_PAD_MODES[attrs.pad_mode])


def _take(attrs: Attrs, x: np.ndarray, indices: Any) -> np.ndarray:
    axis = attrs.axis
    extent = x.size if axis is None else x.shape[axis]
    indices = np.asarray(indices)
    return np.take(x, np.where(indices < 0, indices + extent, indices), axis)


def _expand_dims(attrs: Attrs, x: np.ndarray) -> np.ndarray:
    return np.expand_dims(x, tuple(attrs.axis))


def _squeeze(attrs: Attrs, x: np.ndarray) -> np.ndarray:
    return np.squeeze(x, None if attrs.axis is None else tuple(attrs.axis))


def _cumsum(attrs: Attrs, x: np.ndarray) -> np.ndarray:
    total = np.cumsum(x, attrs.axis, attrs.result.dtype)
    return total - x.astype(total.dtype) if attrs.exclusive else total


def _matmul(attrs: Attrs, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if b.ndim == 2 and a.ndim > 2:  # one large product instead of a batch of small ones
        return (a.reshape(-1, a.shape[-1]) @ b).reshape(*a.shape[:-1], b.shape[1])
    return np.matmul(a, b)


def _astype(attrs: Attrs, x: Any) -> np.ndarray:
    return np.asarray(x).astype(attrs.result.dtype)


def _variance(attrs: Attrs, x: np.ndarray) -> np.ndarray:
    return np.var(x, None if attrs.axis is None else tuple(attrs.axis), keepdims=attrs.keepdims)


def _one_hot(attrs: Attrs, indices: np.ndarray, on: Any, off: Any) -> np.ndarray:
    codes = np.expand_dims(indices, attrs.axis if attrs.axis >= 0 else indices.ndim + 1 + attrs.axis)
    shape = [1] * codes.ndim
    shape[attrs.axis] = attrs.depth
    return np.where(codes == np.arange(attrs.depth).reshape(shape), on, off).astype(attrs.result.dtype)


def _pixel_shuffle(attrs: Attrs, x: np.ndarray) -> np.ndarray:
    r = attrs.upscale_factor
    *batch, c, h, w = x.shape
    blocks = x.reshape(-1, c // r**2, r, r, h, w).transpose(0, 1, 4, 2, 5, 3)
    return blocks.reshape(*batch, c // r**2, h * r, w * r)


def _named(function: str, x: np.ndarray) -> np.ndarray:
    """A function of ``tables``, computed in float64."""
    return find_function(function).reference(x.astype(np.float64)).astype(x.dtype)


TABLE: dict[str, Operator] = {
    # linear and pooling
    "relax.nn.conv2d": convolution.conv2d,
    "relax.nn.conv2d_transpose": convolution.conv2d_transpose,
    "relax.matmul": _matmul,
    "relax.qfp8.recurrent": recurrent.run_float,
    "relax.nn.max_pool2d": convolution.max_pool2d,
    "relax.nn.avg_pool2d": convolution.avg_pool2d,
    "relax.nn.adaptive_avg_pool2d": convolution.adaptive_avg_pool2d,
    # arithmetic
    "relax.add": _plain(np.add),
    "relax.subtract": _plain(np.subtract),
    "relax.multiply": _plain(np.multiply),
    "relax.divide": _plain(_divide),
    "relax.floor_divide": _plain(np.floor_divide),
    "relax.floor_mod": _plain(np.mod),
    "relax.power": _plain(np.power),
    "relax.maximum": _plain(np.maximum),
    "relax.minimum": _plain(np.minimum),
    "relax.abs": _plain(np.abs),
    "relax.negative": _plain(np.negative),
    "relax.sign": _plain(np.sign),
    "relax.floor": _plain(np.floor),
    "relax.ceil": _plain(np.ceil),
    "relax.trunc": _plain(np.trunc),
    "relax.round": _plain(np.rint),
    "relax.square": _plain(np.square),
    "relax.sqrt": _plain(np.sqrt),
    "relax.rsqrt": lambda attrs, x: x.dtype.type(1) / np.sqrt(x),
    "relax.exp": _plain(np.exp),
    "relax.log": _plain(np.log),
    "relax.sin": _plain(np.sin),
    "relax.cos": _plain(np.cos),
    # comparison and logic
    "relax.equal": _plain(np.equal),
    "relax.not_equal": _plain(np.not_equal),
    "relax.less": _plain(np.less),
    "relax.less_equal": _plain(np.less_equal),
    "relax.greater": _plain(np.greater),
    "relax.greater_equal": _plain(np.greater_equal),
    "relax.logical_and": _plain(np.logical_and),
    "relax.logical_or": _plain(np.logical_or),
    "relax.logical_xor": _plain(np.logical_xor),
    "relax.logical_not": _plain(np.logical_not),
    "relax.bitwise_and": _plain(np.bitwise_and),
    "relax.bitwise_or": _plain(np.bitwise_or),
    "relax.bitwise_xor": _plain(np.bitwise_xor),
    "relax.bitwise_not": _plain(np.bitwise_not),
    "relax.isnan": _plain(np.isnan),
    "relax.where": _plain(np.where),
    "relax.clip": _clip,
    # activations and normalisation
    "relax.tanh": _plain(np.tanh),
    "relax.erf": _plain(nonlinear.erf),
    "relax.sigmoid": _plain(nonlinear.sigmoid),
    "relax.nn.relu": lambda attrs, x: np.maximum(x, x.dtype.type(0)),
    "relax.nn.leakyrelu": lambda attrs, x: np.where(x > 0, x, x * x.dtype.type(attrs.alpha)),
    "relax.nn.gelu": _plain(nonlinear.gelu),
    "relax.nn.gelu_tanh": _plain(nonlinear.gelu_tanh),
    "relax.nn.silu": _plain(nonlinear.silu),
    "relax.nn.softplus": lambda attrs, x: nonlinear.softplus(x, attrs.beta, attrs.threshold),
    "relax.nn.prelu": lambda attrs, x, slope: nonlinear.prelu(x, slope, attrs.axis),
    "relax.qfp8.mish": lambda attrs, x: _named("mish", x),
    "relax.qfp8.selu": lambda attrs, x: _named("selu", x),
    "relax.qfp8.elu": lambda attrs, x, alpha: _named(f"elu({alpha!r})", x),
    "relax.qfp8.celu": lambda attrs, x, alpha: _named(f"celu({alpha!r})", x),
    "relax.nn.softmax": lambda attrs, x: nonlinear.softmax(x, attrs.axis),
    "relax.nn.log_softmax": lambda attrs, x: nonlinear.log_softmax(x, attrs.axis),
    "relax.nn.layer_norm": lambda attrs, x, *scale_shift: nonlinear.layer_norm(attrs, x, *scale_shift),
    "relax.nn.group_norm": lambda attrs, x, *scale_shift: nonlinear.group_norm(attrs, x, *scale_shift),
    "relax.nn.instance_norm": lambda attrs, x, *scale_shift: nonlinear.instance_norm(attrs, x, *scale_shift),
    "relax.qfp8.l2_normalize": lambda attrs, x, floor, axis: nonlinear.l2_normalize(x, floor, axis),
    "relax.qfp8.batchnorm_input": lambda attrs, x, number, axis: x,
    "relax.nn.rms_norm": lambda attrs, x, weight: nonlinear.rms_norm(attrs, x, weight),
    # reductions
    "relax.mean": _reduction(np.mean),
    "relax.sum": _reduction(np.sum),
    "relax.max": _reduction(np.max),
    "relax.min": _reduction(np.min),
    "relax.prod": _reduction(np.prod),
    "relax.variance": _variance,
    "relax.argmax": _argument(np.argmax),
    "relax.argmin": _argument(np.argmin),
    "relax.cumsum": _cumsum,
    # shape and data movement
    "relax.astype": _astype,
    "relax.reshape": _reshape,
    "relax.flatten": lambda attrs, x: x.reshape(-1),
    "relax.nn.batch_flatten": lambda attrs, x: x.reshape(len(x), math.prod(x.shape[1:])),
    "relax.permute_dims": lambda attrs, x: np.transpose(x, attrs.axes),
    "relax.expand_dims": _expand_dims,
    "relax.squeeze": _squeeze,
    "relax.broadcast_to": _plain(np.broadcast_to),
    "relax.concat": lambda attrs, parts: np.concatenate(parts, attrs.axis or 0),
    "relax.stack": lambda attrs, parts: np.stack(parts, attrs.axis or 0),
    "relax.split": _split,
    "relax.strided_slice": _strided_slice,
    "relax.nn.pad": _pad,
    "relax.take": _take,
    "relax.gather_elements": lambda attrs, x, indices: np.take_along_axis(x, indices, attrs.axis),
    "relax.index_tensor": lambda attrs, x, indices: x[indices],
    "relax.tile": lambda attrs, x: np.tile(x, attrs.repeats),
    "relax.repeat": lambda attrs, x: np.repeat(x, attrs.repeats, attrs.axis),
    "relax.flip": lambda attrs, x: np.flip(x, attrs.axis),
    "relax.tril": lambda attrs, x, k: np.tril(x, k),
    "relax.triu": lambda attrs, x, k: np.triu(x, k),
    "relax.one_hot": _one_hot,
    "relax.nn.pixel_shuffle": _pixel_shuffle,
    # creation
    "relax.full": lambda attrs, shape, value: np.full(shape, value, attrs.result.dtype),
    "relax.full_like": lambda attrs, x, value: np.full(x.shape, value, attrs.result.dtype),
    "relax.zeros_like": lambda attrs, x: np.zeros(x.shape, attrs.result.dtype),
    "relax.ones_like": lambda attrs, x: np.ones(x.shape, attrs.result.dtype),
    "relax.zeros": lambda attrs, shape: np.zeros(shape, attrs.result.dtype),
    "relax.ones": lambda attrs, shape: np.ones(shape, attrs.result.dtype),
    "relax.arange": lambda attrs, *bounds: np.arange(*bounds).astype(attrs.result.dtype),
    "relax.shape_of": lambda attrs, x: np.asarray(x.shape, np.int64),
    "relax.shape_to_tensor": lambda attrs, shape: np.asarray(shape, np.int64),
    "relax.tensor_to_shape": lambda attrs, x: np.asarray(x, np.int64),
}
