"""Takes padding operators into the windows that read them.

Runs before the layout is chosen. Before::

    lv = R.nn.pad(x, [0, 0, 0, 0, 0, 1, 0, 1])    # torch's "same" padding of TensorFlow's models
    lv1 = R.nn.conv2d(lv, w, strides=[2, 2])

After::

    lv1 = R.nn.conv2d(x, w, strides=[2, 2], padding=[0, 0, 1, 1])

Convolutions and averages that count padding pad with zeros. Maximum pooling pads with minus infinity, for which 0
stands as well where nothing is negative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax

from tvm_qfp8.relay_passes.fuse import op_name, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter

CONVOLUTIONS: dict[str, Callable] = {
    "relax.nn.conv1d": relax.op.nn.conv1d,
    "relax.nn.conv2d": relax.op.nn.conv2d,
}
POOLINGS: dict[str, Callable] = {
    "relax.nn.max_pool1d": relax.op.nn.max_pool1d,
    "relax.nn.max_pool2d": relax.op.nn.max_pool2d,
    "relax.nn.avg_pool1d": relax.op.nn.avg_pool1d,
    "relax.nn.avg_pool2d": relax.op.nn.avg_pool2d,
}
LOWEST = -3.4e38
"""What float32's least number and minus infinity both are below."""


@tvm.transform.module_pass(opt_level=0, name="FoldPadding")
class FoldPadding:
    """Rewrite ``main``; padding that is not read any more is removed."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


class _Rewriter(MainRewriter):
    def replacement(self, _var: relax.Var, value: relax.Expr) -> relax.Call | None:
        name = op_name(value)
        return self._folded(name, value) if name in CONVOLUTIONS or name in POOLINGS else None

    def _folded(self, name: str, value: relax.Call) -> relax.Call | None:
        attrs = value.attrs
        pad: Any = self.definition.get(value.args[0])
        if op_name(pad) != "relax.nn.pad" or str(pad.attrs.pad_mode) != "constant":
            return None
        widths = _spatial_widths(pad, str(attrs.data_layout if name in CONVOLUTIONS else attrs.layout))
        if widths is None:
            return None
        own = [int(width) for width in attrs.padding]
        padding = [a + b for a, b in zip(own, widths, strict=True)]
        number, x = float(pad.attrs.pad_value), self.expression(pad.args[0])
        if name in CONVOLUTIONS:
            if number != 0:
                return None
            return CONVOLUTIONS[name](
                x,
                self.expression(value.args[1]),
                strides=attrs.strides,
                padding=padding,
                dilation=attrs.dilation,
                groups=attrs.groups,
                data_layout=attrs.data_layout,
                kernel_layout=attrs.kernel_layout,
                out_layout=attrs.out_layout,
                out_dtype=attrs.out_dtype,
            )
        counts = bool(attrs.count_include_pad)
        if attrs.ceil_mode or not _fills_window(value, padding):
            return None
        if "max" in name:
            if number > LOWEST and not (number == 0 and self._not_negative(pad.args[0])):
                return None
        elif number != 0 or not (counts or not any(own)):
            return None
        return POOLINGS[name](
            x,
            attrs.pool_size,
            attrs.strides,
            padding,
            attrs.dilation,
            count_include_pad=counts or "avg" in name,
            layout=attrs.layout,
            out_layout=attrs.out_layout,
        )

    def _not_negative(self, expr: relax.Expr) -> bool:
        value: Any = self.definition.get(expr)
        if op_name(value) == "relax.clip":
            return float(value.args[1].value) >= 0
        return op_name(value) == "relax.nn.relu"


def _spatial_widths(pad: relax.Call, layout: str) -> list[int] | None:
    """Widths as windows have them, all begins before all ends; None where batch or channels are padded, or cut."""
    widths = [int(width) for width in pad.attrs.pad_width]
    if static_shape(pad) is None or min(widths) < 0 or len(widths) != 2 * len(layout):
        return None
    pairs = dict(zip(layout, zip(widths[::2], widths[1::2], strict=True), strict=True))
    if any(pairs.pop("N")) or any(pairs.pop("C", (1,))):
        return None
    spatial = [pairs[axis] for axis in "HW" if axis in pairs]
    return [begin for begin, _ in spatial] + [end for _, end in spatial]


def _fills_window(value: relax.Call, padding: list[int]) -> bool:
    """Whether each window, which pooling wants to hold an element at least, is larger than the padding."""
    size = [int(extent) for extent in value.attrs.pool_size] * 2
    return all(width < extent for width, extent in zip(padding, size, strict=True))
