"""Attributes and weights of float convolutions, as the quantized ones have them."""

from __future__ import annotations

import numpy as np
from tvm import relax

from tvm_qfp8.relay_passes.fuse import shape_of


def _four(padding) -> list[int]:
    """Padding as top, left, bottom, right."""
    values = [int(p) for p in padding]
    return values if len(values) == 4 else values * 2 if len(values) == 2 else values * 4


def conv2d_attributes(call: relax.Call) -> dict:
    """Of ``relax.nn.conv2d``."""
    attrs = call.attrs
    return {
        "strides": [int(s) for s in attrs.strides],
        "padding": _four(attrs.padding),
        "dilation": [int(d) for d in attrs.dilation],
        "groups": int(attrs.groups),
    }


def transposed_weights(call: relax.Call, weights: np.ndarray) -> np.ndarray:
    """``kernel_layout`` IOHW or OHWI-like weights -> OHWI of the equal convolution: flipped, groups unfolded."""
    layout, groups = str(call.attrs.kernel_layout), int(call.attrs.groups)
    iohw = weights.transpose([layout.index(axis) for axis in "IOHW"])[:, :, ::-1, ::-1]
    inputs, outputs, kernel_h, kernel_w = iohw.shape
    grouped = iohw.reshape(groups, inputs // groups, outputs, kernel_h, kernel_w)
    return grouped.transpose(0, 2, 3, 4, 1).reshape(groups * outputs, kernel_h, kernel_w, inputs // groups)


def transposed_attributes(call: relax.Call) -> dict:
    """Of the convolution over zeros between pixels that equals a ``relax.nn.conv2d_transpose``."""
    attrs = call.attrs
    dilation = [int(d) for d in attrs.dilation]
    layout = str(attrs.kernel_layout)
    kernel = [shape_of(call.args[1])[layout.index(axis)] for axis in "HW"]
    top, left, bottom, right = _four(attrs.padding)
    extra = [int(p) for p in attrs.output_padding]
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding = [reach[0] - top, reach[1] - left, reach[0] - bottom + extra[0], reach[1] - right + extra[1]]
    return {
        "strides": [1, 1],
        "padding": padding,
        "dilation": dilation,
        "groups": int(attrs.groups),
        "input_dilation": [int(s) for s in attrs.strides],
    }
