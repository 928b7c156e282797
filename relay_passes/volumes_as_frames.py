"""3-D convolutions as 2-D ones over frames, for which there are kernels.

A volume (batch, channels, depth, height, width) is held as its frames (batch * depth, channels, height, width).
Before::

    lv = R.nn.conv3d(x, w, padding=[1, 1, 1, 1, 1, 1])        # w (O, I, 3, 3, 3)

After::

    lv = R.nn.conv2d(R.concat([before, frames, after], axis=1), w1, padding=[1, 1, 1, 1])    # w1 (O, 3 * I, 3, 3)

where ``before`` and ``after`` are the neighbours of each frame, zeros at the ends. Grouped convolutions are sums of
2-D ones. 3-D convolutions start a region of frames; pooling and elementwise operators follow their inputs into it, and
before any other operator the volume is put together again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.layout_rules import ELEMENTWISE
from tvm_qfp8.relay_passes.rewriter import MainRewriter

RANK = 5
SPATIAL = [2, 3, 4]
LOWEST = float(np.finfo(np.float32).min)


@tvm.transform.module_pass(opt_level=0, name="VolumesAsFrames")
class VolumesAsFrames:
    """Rewrite ``main``; constants are turned at once."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        rewriter = _Rewriter(mod)
        if not any(op_name(value) in STARTS for value in rewriter.definition.values()):
            return mod
        return relax.transform.DeadCodeElimination()(rewriter.rewrite())


class Window:
    """Of an operator, along depth: ``size`` places, ``dilation`` apart, moved by ``stride``, ``front`` before frame 0.

    ``flat`` has the operator's attributes along height and width.
    """

    def __init__(self, attrs: Any, size: int) -> None:
        padding = [int(p) for p in attrs.padding]
        padding = padding * 2 if len(padding) == 3 else padding * 6 if len(padding) == 1 else padding
        strides, dilation = ([int(v) for v in values] for values in (attrs.strides, attrs.dilation))
        self.size, self.stride, self.dilation = size, strides[0], dilation[0]
        self.front, self.back = padding[0], padding[3]
        self.flat = {
            "strides": strides[1:],
            "padding": [*padding[1:3], *padding[4:]],
            "dilation": dilation[1:],
        }


class _Rewriter(MainRewriter):
    """``frames`` holds the frames of variables of rank 5."""

    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.frames: dict[relax.Var, relax.Expr] = {}

    def expression(self, expr: relax.Expr) -> relax.Expr:
        """A volume: put together where only its frames exist."""
        if isinstance(expr, relax.Var) and expr not in self.variables and expr in self.frames:
            batch, channels, depth, height, width = shape_of(expr)
            apart = relax.op.reshape(self.frames[expr], (batch, depth, channels, height, width))
            turned = relax.op.permute_dims(self.builder.emit(apart), [0, 2, 1, 3, 4])
            self.variables[expr] = self.builder.emit(turned, f"{expr.name}_volume")
        return super().expression(expr)

    def frames_of(self, expr: relax.Expr) -> relax.Expr:
        """(batch * depth, channels, height, width)."""
        if expr not in self.frames:
            batch, channels, depth, height, width = shape_of(expr)
            turned = self.builder.emit(relax.op.permute_dims(self.expression(expr), [0, 2, 1, 3, 4]))
            flat = relax.op.reshape(turned, (batch * depth, channels, height, width))
            self.frames[expr] = self.builder.emit(flat, f"{getattr(expr, 'name', 'constant')}_frames")
        return self.frames[expr]

    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        name = op_name(value)
        rule = STARTS.get(name) or (FOLLOWS.get(name) if self._follows(value) else None)
        result = rule(self, var, value) if rule else None
        if result is None:
            self.keep(var, value)
        elif name in MEANS:
            self.variables[var] = self.builder.emit(result, var.name)
        else:
            self.frames[var] = self.builder.emit(result, var.name)

    def _follows(self, value: Any) -> bool:
        arguments = [*getattr(value, "args", ())]
        if arguments and isinstance(arguments[0], relax.Tuple):
            arguments = [*arguments[0].fields]
        return any(isinstance(argument, relax.Var) and argument in self.frames for argument in arguments)

    def taps(
        self, frames: relax.Expr, volume: relax.Expr, out_depth: int, window: Window, beyond: float
    ) -> list[relax.Expr]:
        """For each place of a window over depth the frames that stand there: (batch * out_depth, ...).

        Frames beyond the ends of ``volume`` hold the value ``beyond``.
        """
        batch, _, depth = shape_of(volume)[:3]
        end = batch * depth
        first = np.arange(out_depth) * window.stride - window.front
        places = [first + tap * window.dilation for tap in range(window.size)]
        inside = [(place >= 0) & (place < depth) for place in places]
        if not np.all(inside):
            frames = self.builder.emit(relax.op.nn.pad(frames, [0, 1, *[0] * 6], pad_value=beyond))
        found = []
        for place, is_inside in zip(places, inside, strict=True):
            of_samples = [np.where(is_inside, place + sample * depth, end) for sample in range(batch)]
            taken = np.concatenate(of_samples)
            if np.all(inside) and np.array_equal(taken, np.arange(end)):
                found.append(frames)
            else:
                take = relax.op.take(frames, relax.const(taken), axis=0, mode="clip")
                found.append(self.builder.emit(take))
        return found


def convolution(rewriter: _Rewriter, var: relax.Var, value: relax.Call) -> relax.Call | None:
    """conv3d with constant weights."""
    weight, attrs = rewriter.constant(value.args[1]), value.attrs
    layouts = str(attrs.data_layout), str(attrs.kernel_layout)
    x = value.args[0]
    if weight is None or layouts != ("NCDHW", "OIDHW") or static_shape(x) is None:
        return None
    array, groups = weight.value.numpy(), int(attrs.groups)
    window = Window(attrs, array.shape[2])
    taps = rewriter.taps(rewriter.frames_of(x), x, shape_of(var)[2], window, 0.0)
    emit = rewriter.builder.emit
    if groups == 1:
        joined = taps[0] if len(taps) == 1 else emit(relax.op.concat(taps, axis=1))
        outputs, _, _, *kernel = array.shape
        flat = array.transpose(0, 2, 1, 3, 4).reshape(outputs, -1, *kernel)
        return relax.op.nn.conv2d(joined, relax.const(np.ascontiguousarray(flat)), **window.flat)
    parts = [
        relax.op.nn.conv2d(
            frames, relax.const(np.ascontiguousarray(array[:, :, tap])), **window.flat, groups=groups
        )
        for tap, frames in enumerate(taps)
    ]
    total = parts[0]
    for tap, part in enumerate(parts[1:], 1):
        total = relax.op.add(emit(total, f"{var.name}_{tap - 1}"), emit(part, f"{var.name}_tap{tap}"))
    return total


def transposed_convolution(rewriter: _Rewriter, var: relax.Var, value: relax.Call) -> relax.Call | None:
    """conv3d_transpose with constant weights whose windows do not meet along depth, as in U-Nets."""
    weight, attrs = rewriter.constant(value.args[1]), value.attrs
    layouts = str(attrs.data_layout), str(attrs.kernel_layout)
    if weight is None or layouts != ("NCDHW", "IODHW") or static_shape(value.args[0]) is None:
        return None
    array = weight.value.numpy()
    window = Window(attrs, array.shape[2])
    beyond = [int(p) for p in attrs.output_padding]
    if (
        int(attrs.groups) != 1
        or window.stride != window.size
        or (window.front, window.back, window.dilation, beyond[0]) != (0, 0, 1, 0)
    ):
        return None
    inputs, outputs, size, *kernel = array.shape
    flat = np.ascontiguousarray(array.transpose(0, 2, 1, 3, 4).reshape(inputs, size * outputs, *kernel))
    call = relax.op.nn.conv2d_transpose(
        rewriter.frames_of(value.args[0]), relax.const(flat), **window.flat, output_padding=beyond[1:]
    )
    batch, channels, depth, height, width = shape_of(var)
    return relax.op.reshape(
        rewriter.builder.emit(call, f"{var.name}_planes"), (batch * depth, channels, height, width)
    )


def pooling(rewriter: _Rewriter, var: relax.Var, value: relax.Call) -> relax.Expr | None:
    """Of each frame, then along depth."""
    attrs, x = value.attrs, value.args[0]
    size = [int(extent) for extent in attrs.pool_size]
    window, is_max = Window(attrs, size[0]), op_name(value) == "relax.nn.max_pool3d"
    reaches = (shape_of(var)[2] - 1) * window.stride + (size[0] - 1) * window.dilation - window.front
    within = window.front == 0 and reaches < shape_of(x)[2]
    counts_all = bool(attrs.count_include_pad) and not bool(attrs.ceil_mode)
    if str(attrs.layout) != "NCDHW" or not (is_max or within or counts_all):
        return None
    make = relax.op.nn.max_pool2d if is_max else relax.op.nn.avg_pool2d
    emit = rewriter.builder.emit
    flat = make(
        rewriter.frames_of(x),
        size[1:],
        **window.flat,
        ceil_mode=bool(attrs.ceil_mode),
        count_include_pad=bool(attrs.count_include_pad),
    )
    first, *others = rewriter.taps(emit(flat), x, shape_of(var)[2], window, LOWEST if is_max else 0.0)
    combine = relax.op.maximum if is_max else relax.op.add
    for other in others:
        first = emit(combine(first, other))
    return first if is_max else relax.op.multiply(first, relax.const(np.float32(1 / size[0])))


def mean(rewriter: _Rewriter, var: relax.Var, value: relax.Call) -> relax.Call | None:
    """Over the whole volume."""
    attrs, x = value.attrs, value.args[0]
    if op_name(value) == "relax.mean":
        if attrs.axis is None or sorted(int(axis) % RANK for axis in attrs.axis) != SPATIAL:
            return None
    elif attrs.output_size is None or {int(extent) for extent in attrs.output_size} != {1}:
        return None
    batch, channels, depth = shape_of(x)[:3]
    of_frames = rewriter.builder.emit(relax.op.mean(rewriter.frames_of(x), [2, 3], keepdims=True))
    rows = rewriter.builder.emit(relax.op.reshape(of_frames, (batch, depth, channels)))
    return relax.op.reshape(rewriter.builder.emit(relax.op.mean(rows, 1)), shape_of(var))


def elementwise(rewriter: _Rewriter, var: relax.Var, value: relax.Call) -> relax.Call | None:
    """Of volumes of one shape, or that broadcast frame by frame, and of constants for channels."""
    arguments = [_argument(rewriter, argument, shape_of(var)) for argument in value.args]
    if any(argument is None for argument in arguments):
        return None
    return relax.Call(value.op, arguments, value.attrs, value.ty_args)


def _argument(rewriter: _Rewriter, argument: relax.Expr, shape: tuple[int, ...]) -> relax.Expr | None:
    if not isinstance(argument.ty, relax.TensorType):
        return argument
    constant = rewriter.constant(argument)
    if constant is not None:
        array = constant.value.numpy()
        if array.size == 1:
            return relax.const(array.reshape(()), str(array.dtype))
        array = array.reshape((1,) * (RANK - array.ndim) + array.shape)
        return (
            relax.const(np.ascontiguousarray(array[:, :, 0]), str(array.dtype))
            if (array.shape[0], array.shape[2]) == (1, 1)
            else None
        )
    own = static_shape(argument)
    same_frames = own is not None and len(own) == RANK and (own[0], own[2]) == (shape[0], shape[2])
    one_for_all = own is not None and len(own) == RANK and shape[0] == 1 and own[2] == 1
    return rewriter.frames_of(argument) if same_frames or one_for_all else None


def concat(rewriter: _Rewriter, var: relax.Var, value: relax.Call) -> relax.Call | None:
    """Of channels."""
    if int(value.attrs.axis) % RANK != 1 or not isinstance(value.args[0], relax.Tuple):
        return None
    return relax.op.concat([rewriter.frames_of(part) for part in value.args[0].fields], axis=1)


STARTS: dict[str, Callable] = {
    "relax.nn.conv3d": convolution,
    "relax.nn.conv3d_transpose": transposed_convolution,
}
MEANS: dict[str, Callable] = {"relax.mean": mean, "relax.nn.adaptive_avg_pool3d": mean}
FOLLOWS: dict[str, Callable] = {
    **{f"relax.{name}": elementwise for name in ELEMENTWISE},
    **MEANS,
    "relax.nn.max_pool3d": pooling,
    "relax.nn.avg_pool3d": pooling,
    "relax.concat": concat,
}
