"""Puts linear layers on QFP8 tensors.

Runs on the canonical program with the calibration's plan. Before::

    lv1 = R.nn.conv2d(lv, weight, ...)            # NHWC, OHWI
    lv2 = R.add(lv1, bias)

After::

    q = R.qfp8.encode(lv, layout="UE2M6", scale=...)
    lv2 = R.qfp8.conv2d(q, weight_codes, a, bias, ...)

``a[c]`` is the product of the weight's and the activation's scale; the bias already holds the calibration's
correction. A tensor read by several layers is encoded once. An encode moves up through operators that only move
data, so that they move bytes. Products of two activations (attention) are quantized where the plan has both. What
the plan skips stays in float32, with its reason in the plan.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.calibration.plan import LinearQuantization, QuantizationPlan
from tvm_qfp8.format import get_layout
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.fuse import op_name, static_shape

MOVES_DATA = (
    "relax.reshape",
    "relax.permute_dims",
    "relax.squeeze",
    "relax.expand_dims",
    "relax.flatten",
)


def codes_constant(codes: np.ndarray, layout: str) -> GenericConst:
    """A Relax constant of the layout's data type."""
    stored = tvm.runtime.tensor(np.ascontiguousarray(codes))
    return relax.const(stored._create_view(codes.shape, get_layout(layout).ir_dtype))


@tvm.transform.module_pass(opt_level=0, name="QuantizeLinear")
class QuantizeLinear:
    """Rewrite ``main`` according to a plan."""

    def __init__(self, plan: QuantizationPlan) -> None:
        self.plan = plan

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        main = mod["main"]
        rewriter = _Rewriter(main, self.plan)
        with rewriter.builder.function("main", rewriter.parameters, attrs={"num_input": len(rewriter.parameters)}):
            with rewriter.builder.dataflow():
                for block in main.body.blocks:
                    for binding in block.bindings:
                        rewriter.binding(binding.var, binding.value)
                output = rewriter.builder.emit_output(rewriter.expression(main.body.body))
            rewriter.builder.emit_func_output(output)
        return rewriter.builder.get()


class _Rewriter:
    def __init__(self, main: relax.Function, plan: QuantizationPlan) -> None:
        self.plan = plan
        self.builder = relax.BlockBuilder()
        self.parameters = [relax.Var(p.name, p.ty) for p in main.params]
        self.variables = dict(zip(main.params, self.parameters, strict=True))
        self.definition: dict[relax.Var, relax.Expr] = {}
        self.uses: dict[relax.Var, int] = {}
        self.next_add: dict[relax.Var, tuple[relax.Var, np.ndarray]] = {}
        self._encoded: dict[tuple, relax.Expr] = {}
        self._done: set[relax.Var] = set()
        bindings = [b for block in main.body.blocks for b in block.bindings]
        for binding in bindings:
            self.definition[binding.var] = binding.value
            relax.analysis.post_order_visit(binding.value, self._count)
        self._count(main.body.body)
        for binding in bindings:
            self._note_bias(binding.var, binding.value)

    def _count(self, expr) -> None:
        if isinstance(expr, relax.Var):
            self.uses[expr] = self.uses.get(expr, 0) + 1

    def _note_bias(self, var: relax.Var, value: relax.Expr) -> None:
        """Remember ``add(linear, constant per channel)`` where the linear result has no other use."""
        if op_name(value) != "relax.add":
            return
        for linear, constant in (value.args, reversed(value.args)):
            if not isinstance(linear, relax.Var) or not isinstance(constant, GenericConst):
                continue
            channels = static_shape(linear)[-1]
            data = constant.value.numpy()
            per_channel = data.size == channels and data.shape[-1:] == (channels,)
            if linear.name in self.plan.linear and self.uses[linear] == 1 and per_channel:
                self.next_add[linear] = (var, data.reshape(-1).astype(np.float32))

    def expression(self, expr: relax.Expr) -> relax.Expr:
        """The expression over the new variables."""
        if isinstance(expr, relax.Var):
            return self.variables[expr]
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self.expression(field) for field in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self.expression(expr.tuple_value), expr.index)
        if isinstance(expr, relax.Call):
            return relax.Call(expr.op, [self.expression(a) for a in expr.args], expr.attrs, expr.ty_args)
        return expr

    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        if var in self._done:
            return
        quantization = self.plan.linear.get(var.name)
        if quantization is not None and quantization.activation_layout is not None:
            self._linear(var, value, quantization)
        elif var.name in self.plan.products:
            self._product(var, value)
        else:
            self.variables[var] = self.builder.emit(self.expression(value), var.name)

    def _linear(self, var: relax.Var, value: relax.Call, quantization: LinearQuantization) -> None:
        weight = quantization.weight
        codes, channels = weight.codes, weight.codes.shape[weight.axis]
        target, bias = self.next_add.get(var, (var, np.zeros(channels, np.float32)))
        if quantization.bias_correction is not None:
            bias = (bias - quantization.bias_correction).astype(np.float32)
        activation_scale = np.float32(quantization.activation_scale)
        a = np.broadcast_to(np.asarray(weight.scale, np.float32).reshape(-1) * activation_scale, (channels,))
        x = self._encode(value.args[0], quantization.activation_layout, float(activation_scale))
        constants = [relax.const(np.ascontiguousarray(a, np.float32)), relax.const(bias)]
        if op_name(value) == "relax.matmul":
            call = qfp8_ops.matmul(x, codes_constant(codes.T, weight.layout), *constants)
        else:
            attrs = value.attrs
            padding = [int(p) for p in attrs.padding]
            call = qfp8_ops.conv2d(
                x,
                codes_constant(codes, weight.layout),
                *constants,
                strides=[int(s) for s in attrs.strides],
                padding=padding if len(padding) == 4 else padding * 2 if len(padding) == 2 else padding * 4,
                dilation=[int(d) for d in attrs.dilation],
                groups=int(attrs.groups),
            )
        self.variables[target] = self.builder.emit(call, target.name)
        self._done.add(target)

    def _product(self, var: relax.Var, value: relax.Call) -> None:
        x, y = value.args
        (x_layout, x_scale), (y_layout, y_scale) = self.plan.products[var.name]
        transposed = self._last_two_swapped(y)
        encoded_x = self._encode(x, x_layout, x_scale)
        encoded_y = self._encode(y if transposed is None else transposed, y_layout, y_scale)
        if transposed is not None and not isinstance(transposed, relax.Var):
            transposed = None
        scale = float(np.float32(x_scale) * np.float32(y_scale))
        call = qfp8_ops.batch_matmul(encoded_x, encoded_y, scale, transpose_y=transposed is not None)
        self.variables[var] = self.builder.emit(call, var.name)

    def _last_two_swapped(self, var: relax.Expr) -> relax.Var | None:
        """x where ``var = permute_dims(x)`` exchanges just the last two axes."""
        value = self.definition.get(var) if isinstance(var, relax.Var) else None
        if op_name(value) != "relax.permute_dims" or value.attrs.axes is None:
            return None
        axes = [int(axis) for axis in value.attrs.axes]
        rank = len(axes)
        swapped = [*range(rank - 2), rank - 1, rank - 2]
        return value.args[0] if axes == swapped and isinstance(value.args[0], relax.Var) else None

    def _encode(self, expr: relax.Expr, layout: str, scale: float) -> relax.Expr:
        key = (expr, layout, scale)
        if key not in self._encoded:
            value = self.definition.get(expr) if isinstance(expr, relax.Var) else None
            if op_name(value) in MOVES_DATA:
                source = self._encode(value.args[0], layout, scale)
                moved = relax.Call(value.op, [source, *map(self.expression, value.args[1:])], value.attrs)
            else:
                moved = qfp8_ops.encode(self.expression(expr), get_layout(layout), scale)
            self._encoded[key] = self.builder.emit(moved, f"{getattr(expr, 'name', 'constant')}_codes")
        return self._encoded[key]
