"""Takes rows and columns off a convolution's window that never meet anything but padding, or hold zeros.

Large dilations on small images have the first, as the pyramid of DeepLab: of a 3x3 window with dilation 36 on 16x16
pixels only the centre lies in the image. Before::

    lv = R.nn.conv2d(x, w, padding=[36, 36, 36, 36], dilation=[36, 36])   # x (1, 16, 16, 960), w (256, 3, 3, 960)

After::

    lv = R.nn.conv2d(x, w1, padding=[0, 0, 0, 0], dilation=[36, 36])      # w1 (256, 1, 1, 960), the centre

Spectra in speech models have the second: sines of 400 samples in a window of 512. Where the image ends in pixels that
no tap meets any more, they are cut off, if that saves more than it costs.
"""

from __future__ import annotations

import math

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter

CUT_COST = 64
"""Of a value of the image that stays when others are cut off, in multiply-adds."""


@tvm.transform.module_pass(opt_level=0, name="DropTaps")
class DropTaps:
    """Rewrite ``main``."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return _Rewriter(mod).rewrite()


class _Rewriter(MainRewriter):
    def replacement(self, _var: relax.Var, value: relax.Expr) -> relax.Call | None:
        if op_name(value) != "relax.nn.conv2d" or static_shape(value) is None:
            return None
        x, weight = value.args
        attrs = value.attrs
        if static_shape(x) is None or not isinstance(weight, GenericConst):
            return None
        image = dict(zip(str(attrs.data_layout), shape_of(x), strict=True))
        result = dict(zip(str(attrs.out_layout), shape_of(value), strict=True))
        layout, window = str(attrs.kernel_layout), weight.value.numpy()
        padding, kept = [int(p) for p in attrs.padding], [slice(None)] * 4
        for index, axis in enumerate("HW"):
            extent, place = image[axis], layout.index(axis)
            stride, dilation = int(attrs.strides[index]), int(attrs.dilation[index])
            starts = np.arange(window.shape[place])[:, None] * dilation - padding[index]
            seen = starts + np.arange(result[axis]) * stride
            others = tuple(other for other in range(4) if other != place)
            useful = np.flatnonzero(((seen >= 0) & (seen < extent)).any(axis=1) & window.any(axis=others))
            if not useful.size:
                return None
            first, last = int(useful[0]), int(useful[-1])
            kept[place] = slice(first, last + 1)
            padding[index] -= first * dilation
            padding[2 + index] -= (window.shape[place] - 1 - last) * dilation
        fewer = np.ascontiguousarray(window[tuple(kept)])
        if fewer.shape == window.shape:
            return None
        source = self.expression(x)
        if min(padding) < 0:
            saved = (window.size - fewer.size) * math.prod(result[axis] for axis in "NHW")
            if saved < CUT_COST * math.prod(shape_of(x)):
                return None
            axes = [str(attrs.data_layout).index(axis) for axis in "HW"]
            starts_at = [max(0, -p) for p in padding[:2]]
            ends = [image[axis] - max(0, -p) for axis, p in zip("HW", padding[2:], strict=True)]
            source = self.builder.emit(relax.op.strided_slice(source, axes, starts_at, ends))
        return relax.op.nn.conv2d(
            source,
            relax.const(fewer),
            strides=attrs.strides,
            padding=[max(0, p) for p in padding],
            dilation=attrs.dilation,
            groups=int(attrs.groups),
            data_layout=str(attrs.data_layout),
            kernel_layout=layout,
            out_layout=str(attrs.out_layout),
            out_dtype=attrs.out_dtype,
        )
