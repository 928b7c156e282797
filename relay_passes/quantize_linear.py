"""Puts linear layers on QFP8 tensors.

Runs on the canonical program with the calibration's plan. Before::

    lv1 = R.nn.conv2d(lv, weight, ...)            # NHWC, OHWI
    lv2 = R.add(lv1, bias)

After::

    q = R.qfp8.encode(lv, layout="UE2M6", scale=...)
    lv2 = R.qfp8.conv2d(q, weight_codes, a, bias, ...)

``a[c]`` is the product of the weight's and the activation's scale; the bias already holds the calibration's
correction. A tensor read by several layers is encoded once, and read by sums as codes, too, where the plan says so.
Where the plan has a scale for each row, ``encode_rows`` makes codes and scales, and the matmul takes both
(``encodings``). Products of two activations (attention) are quantized where the plan has both. What the plan skips
stays in float32, with its reason in the plan.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.calibration.linear import LINEAR
from tvm_qfp8.calibration.plan import LinearQuantization, QuantizationPlan
from tvm_qfp8.calibration.recurrent_layer import RECURRENT
from tvm_qfp8.dtype import codes_tensor
from tvm_qfp8.format import get_layout
from tvm_qfp8.layer_names import layer_name
from tvm_qfp8.recurrent_cell import Cell
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.conv_attributes import (
    conv2d_attributes,
    transposed_attributes,
    transposed_weights,
)
from tvm_qfp8.relay_passes.encodings import EncodingRewriter
from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape

MAX_IMAGE_CHANNELS = 4
"""Up to so many channels a convolution reads NCHW itself."""


def codes_constant(codes: np.ndarray, layout: str) -> relax.Expr:
    """A Relax constant of the layout's data type."""
    return relax.const(codes_tensor(codes, get_layout(layout)))


@tvm.transform.module_pass(opt_level=0, name="QuantizeLinear")
class QuantizeLinear:
    """Rewrite ``main`` according to a plan."""

    def __init__(self, plan: QuantizationPlan) -> None:
        self.plan = plan

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return _Rewriter(mod, self.plan).rewrite()


class _Rewriter(EncodingRewriter):
    def __init__(self, mod: tvm.IRModule, plan: QuantizationPlan) -> None:
        super().__init__(mod, plan)
        self.next_add: dict[relax.Var, tuple[relax.Var, np.ndarray]] = {}
        self._done: set[relax.Var] = set()
        for var, value in self.definition.items():
            self._note_bias(var, value)

    def _note_bias(self, var: relax.Var, value: relax.Expr) -> None:
        """Remember ``add(linear, constant per channel)`` where the linear result has no other use."""
        if op_name(value) != "relax.add":
            return
        for linear, constant in (value.args, reversed(value.args)):
            if not isinstance(linear, relax.Var) or not isinstance(constant, GenericConst):
                continue
            channels = shape_of(linear)[-1:]
            data = constant.value.numpy()
            per_channel = (data.size,) == channels == data.shape[-1:]
            if layer_name(linear) in self.plan.linear and self.uses[linear] == 1 and per_channel:
                self.next_add[linear] = (var, data.reshape(-1).astype(np.float32))

    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        self._lower(var, value)
        kept = self.plan.codes.get(layer_name(var))
        if kept is not None:
            assert kept.scale is not None
            codes = self.encode(var, kept.layout, kept.scale)
            self.variables[var] = self.builder.emit(qfp8_ops.decode(codes, kept.scale), var.name)

    def _lower(self, var: relax.Var, value: relax.Expr) -> None:
        if var in self._done:
            return
        if op_name(value) in LINEAR and isinstance(value.args[1], GenericConst) and self._can_lower(value):
            self._linear(var, value, self.plan.linear.get(layer_name(var)))
        elif layer_name(var) in self.plan.embeddings:
            table = self.plan.embeddings[layer_name(var)]
            rows = codes_constant(table.codes, table.layout)
            call = qfp8_ops.take(rows, relax.const(table.scale), self.expression(value.args[1]))
            self.variables[var] = self.builder.emit(call, var.name)
        elif op_name(value) == RECURRENT and layer_name(var) in self.plan.linear:
            self._recurrent(var, value, self.plan.linear[layer_name(var)])
        elif op_name(value) == "relax.matmul" and self._is_batched(value):
            self._product(var, value)
        else:
            self.keep(var, value)

    @staticmethod
    def _can_lower(value: relax.Call) -> bool:
        """float32, static, and a matrix or a convolution in the canonical layout."""
        weight = value.args[1]
        if str(value.ty.dtype) != "float32" or static_shape(value) is None:
            return False
        if op_name(value) == "relax.matmul":
            return len(shape_of(weight)) == 2 and len(shape_of(value.args[0])) >= 2
        return len(shape_of(weight)) == 4

    @staticmethod
    def _is_batched(value: relax.Call) -> bool:
        x, y = (static_shape(argument) for argument in value.args)
        same = x is not None and y is not None and len(x) == len(y) >= 2 and x[:-2] == y[:-2]
        return same and str(value.ty.dtype) == "float32"

    def _linear(self, var: relax.Var, value: relax.Call, quantization: LinearQuantization | None) -> None:
        operator = op_name(value)
        if quantization is None:
            weights, scale, layout = value.args[1].value.numpy(), np.ones(1, np.float32), None
        else:
            weights, layout = quantization.weight.codes, quantization.weight.layout
            scale = np.asarray(quantization.weight.scale, np.float32).reshape(-1)
        if operator == "relax.matmul":
            weights = weights.T
        elif operator == "relax.nn.conv2d_transpose":
            weights = transposed_weights(value, weights)
        channels = weights.shape[0]
        target, bias = self.next_add.get(var, (var, np.zeros(channels, np.float32)))
        a = np.tile(scale, channels // len(scale))
        x, image, scales = value.args[0], None, None
        activation = None if quantization is None else quantization.activation
        if quantization is not None and quantization.bias_correction is not None:
            bias = (bias - quantization.bias_correction).astype(np.float32)
        if activation is None:
            x = self.expression(x)
        else:
            image = None if activation.by_rows else self._image(value)
            if activation.scale is None:
                x, scales = self.encode_at_run_time(x if image is None else image, activation)
            else:
                a = a * np.float32(activation.scale)
                if activation.factors is not None:
                    x = self.encode_channels(x, activation)
                else:
                    x = self.encode(x if image is None else image, activation.layout, activation.scale)
        weights = np.ascontiguousarray(weights)
        weight = relax.const(weights) if layout is None else codes_constant(weights, layout)
        constants = (weight, relax.const(a.astype(np.float32)), relax.const(bias))
        if operator == "relax.matmul":
            result = self.builder.emit(qfp8_ops.matmul(x, *constants, row_scales=scales), var.name)
        elif operator == "relax.nn.conv2d":
            attributes = conv2d_attributes(value)
            if activation is not None and activation.by_rows:
                x, scales = (self._every(attributes["strides"], part) for part in (x, scales))
                attributes["strides"] = [1, 1]
            call = qfp8_ops.conv2d(
                x, *constants, **attributes, channels_first=image is not None, scales=scales
            )
            result = self.builder.emit(call, var.name)
        else:
            result = self._transposed(x, constants, scales, value, var)
        self.variables[target] = result
        self._done.add(target)

    def _recurrent(self, var: relax.Var, value: relax.Call, quantization: LinearQuantization) -> None:
        """The product with the hidden state; the state is encoded in the loop."""
        inputs, _, _, bias, *others = value.args
        weight, activation = quantization.weight, quantization.activation
        a, shift = np.asarray(weight.scale, np.float32), bias.value.numpy()
        layout, scale = "", 0.0
        if activation is not None:
            assert activation.scale is not None
            a = a * np.float32(activation.scale)
            layout, scale = activation.layout, activation.scale
        if quantization.bias_correction is not None:
            shift = (shift - quantization.bias_correction).astype(np.float32)
        constants = (codes_constant(weight.codes, weight.layout), relax.const(a), relax.const(shift))
        arguments = [self.expression(inputs), *constants, *map(self.expression, others)]
        cell, reverse = Cell.of(value.attrs), bool(value.attrs["reverse"])
        call = qfp8_ops.recurrent(arguments, cell, reverse=reverse, layout=layout, scale=scale)
        self.variables[var] = self.builder.emit(call, var.name)

    def _image(self, value: relax.Call) -> relax.Var | None:
        """The NCHW tensor of few channels whose transposition a convolution reads."""
        x: Any = value.args[0]
        made = self.bound(x)
        if op_name(value) != "relax.nn.conv2d" or op_name(made) != "relax.permute_dims":
            return None
        to_nhwc = made.attrs.axes is not None and [int(axis) for axis in made.attrs.axes] == [0, 2, 3, 1]
        few = shape_of(x)[-1] <= MAX_IMAGE_CHANNELS and int(value.attrs.groups) == 1
        return made.args[0] if to_nhwc and few and isinstance(made.args[0], relax.Var) else None

    def _transposed(self, x, constants: tuple, scales, value: relax.Call, var: relax.Var) -> relax.Var:
        """A transposed convolution: a convolution over zeros between the pixels, in NHWC whatever the file has."""
        to_nhwc, back = [0, 2, 3, 1], [0, 3, 1, 2]
        nchw = str(value.attrs.data_layout) == "NCHW"
        if nchw:
            x = self.builder.emit(relax.op.permute_dims(x, to_nhwc))
        call = qfp8_ops.conv2d(x, *constants, **transposed_attributes(value), scales=scales)
        result = self.builder.emit(call, var.name)
        return self.builder.emit(relax.op.permute_dims(result, back)) if nchw else result

    def _product(self, var: relax.Var, value: relax.Call) -> None:
        x, y = value.args
        source, axes = self._last_two_swapped(y) or (y, None)
        chosen = self.plan.products.get(layer_name(var))
        if chosen is not None:
            if chosen[1].by_samples and axes is not None and axes[0] != 0:
                source, axes = y, None  # samples of the source are others than the product's
            operands = zip((x, source), chosen, strict=True)
            (left, x_scale, x_scales), (right, y_scale, y_scales) = (self.operand(*one) for one in operands)
        else:
            left, right, x_scales, y_scales = self.expression(x), self.expression(source), None, None
            x_scale = y_scale = np.float32(1)
        if axes is not None and axes != sorted(axes):
            right = self.builder.emit(relax.op.permute_dims(right, axes))
        scale = float(x_scale * y_scale)
        call = qfp8_ops.batch_matmul(
            left, right, scale, transpose_y=axes is not None, x_scales=x_scales, y_scales=y_scales
        )
        self.variables[var] = self.builder.emit(call, var.name)

    def _last_two_swapped(self, var: relax.Expr) -> tuple[relax.Var, list[int]] | None:
        """(x, axes) where ``var`` is ``permute_dims(x, axes)`` with the last two axes exchanged.

        Only where the values of a row stay together without the exchange: moving rows is much cheaper.
        """
        value = self.bound(var)
        if op_name(value) != "relax.permute_dims" or value.attrs.axes is None:
            return None
        axes = [int(axis) for axis in value.attrs.axes]
        rank = len(axes)
        straight = [*axes[:-2], axes[-1], axes[-2]]
        rows_stay = rank >= 2 and straight[-1] == rank - 1
        return (value.args[0], straight) if rows_stay and isinstance(value.args[0], relax.Var) else None

    def _every(self, strides: list[int], rows: relax.Expr) -> relax.Expr:
        """Of codes or scales of pixels, those that a 1x1 convolution with ``strides`` reads."""
        if strides == [1, 1]:
            return rows
        ends = shape_of(rows)[1:3]
        return self.builder.emit(relax.op.strided_slice(rows, [1, 2], [0, 0], ends, strides))
