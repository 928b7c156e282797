"""Carries the layouts and scales of quantization-aware training from an imported program to the plan.

``ClaimTrained`` runs on the imported program. Before::

    lv = R.qfp8.fake_quantize(x, x_scale, layout="E3M4")
    lv1 = R.qfp8.fake_quantize(weight, weight_scale, layout="E2M5", axis=0)
    lv2 = R.nn.conv2d(lv, lv1)

After, with the weight's values rounded::

    lv2 = R.nn.conv2d(x, weight)
    lv3 = R.qfp8.trained(lv2, weight_scale, weight_layout="E2M5", activation_layout="E3M4", activation_scale=...)

The mark says how the layer whose result it passes on was trained. Passes on the way to canonical form move it along
with its layer, and ``FoldBatchnorm`` multiplies its scales as it does the weights. Then ``take_trained`` takes the
marks out and hands back what they say as a plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import tvm
from tvm import relax

from tvm_qfp8.calibration.embeddings import embedding_tables
from tvm_qfp8.calibration.evaluate import Program
from tvm_qfp8.calibration.linear import find_linear
from tvm_qfp8.calibration.plan import ActivationQuantization, LinearQuantization, QuantizationPlan
from tvm_qfp8.data_movement import KEEPS_ELEMENTS
from tvm_qfp8.errors import ModelError
from tvm_qfp8.format import decode, encode, get_layout
from tvm_qfp8.layer_names import layer_name
from tvm_qfp8.quantize import QTensor
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.fuse import op_name, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter

FAKE_QUANTIZE, TRAINED = "relax.qfp8.fake_quantize", "relax.qfp8.trained"
REPEATS = ("relax.broadcast_to", "relax.reshape")
LINEAR = ("relax.matmul", "relax.nn.conv1d", "relax.nn.conv2d", "relax.nn.conv2d_transpose")
MOST_EXPONENT_BITS = 3
LEFT_OUT = "not quantized when the model was trained"


@dataclass(frozen=True)
class _Weight:
    """A rounded constant."""

    array: np.ndarray
    scale: np.ndarray
    layout: str


@dataclass(frozen=True)
class _Activation:
    """A rounded tensor: what is rounded, in the new program, and how."""

    source: relax.Expr
    layout: str
    scale: float


@tvm.transform.module_pass(opt_level=0, name="ClaimTrained")
class ClaimTrained:
    """Rewrite ``main``, where anything is fake-quantized."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        rewriter = _Claim(mod)
        fake = any(op_name(value) == FAKE_QUANTIZE for value in rewriter.definition.values())
        return rewriter.rewrite() if fake else mod


class _Claim(MainRewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.weights: dict[relax.Var, _Weight] = {}
        self.activations: dict[relax.Var, _Activation] = {}

    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        name = op_name(value)
        if name == FAKE_QUANTIZE:
            self._round(var, value)
        elif name == "relax.permute_dims" and value.args[0] in self.weights:
            weight, axes = self.weights[value.args[0]], value.attrs.axes
            order = None if axes is None else [int(axis) for axis in axes]
            self.weights[var] = replace(weight, array=np.ascontiguousarray(weight.array.transpose(order)))
        elif name in REPEATS and value.args[0] in self.weights and self._same_matrix(var, value):
            # torch's bmm of one weight for all: matmul broadcasts by itself.
            self.weights[var] = self.weights[value.args[0]]
        elif name == "relax.broadcast_to" and static_shape(value.args[0]) == static_shape(var):
            if value.args[0] in self.activations:
                self.activations[var] = self.activations[value.args[0]]
            else:
                self.variables[var] = self.expression(value.args[0])
        elif name in KEEPS_ELEMENTS and value.args[0] in self.activations:
            # Rounding is the same before and after.
            rounded = self.activations[value.args[0]]
            moved = relax.Call(value.op, [rounded.source, *map(self.expression, value.args[1:])], value.attrs)
            self.activations[var] = replace(rounded, source=self.builder.emit(moved, var.name))
        elif name in LINEAR and value.args[1] in self.weights:
            x = self.activations.get(value.args[0])
            source = self.expression(value.args[0]) if x is None else x.source
            weight = self.weights[value.args[1]]
            self._mark(var, value, [source, relax.const(weight.array)], weight, x)
        elif name == "relax.take" and value.args[0] in self.weights:
            weight = self.weights[value.args[0]]
            arguments = [relax.const(weight.array), *map(self.expression, value.args[1:])]
            self._mark(var, value, arguments, weight, None)
        else:
            self._refuse_rounded(value)
            self.keep(var, value)

    def _same_matrix(self, var: relax.Var, value: relax.Call) -> bool:
        shape, matrix = static_shape(var) or (), self.weights[value.args[0]].array.shape
        return len(matrix) == 2 and shape[-2:] == matrix

    def _refuse_rounded(self, value: relax.Expr) -> None:
        for read in relax.analysis.free_vars(value):
            if read in self.weights or read in self.activations:
                raise ModelError(
                    f"a fake-quantized tensor is read by {op_name(value)}; only linear layers with constant weights "
                    "can, as tvm_qfp8.torch.prepare_qat makes them"
                )

    def _round(self, var: relax.Var, value: relax.Call) -> None:
        layout, axis = str(value.attrs["layout"]), int(value.attrs["axis"])
        if get_layout(layout).exponent_bits > MOST_EXPONENT_BITS:
            raise ModelError(
                f"a layer was trained in {layout}; kernels have up to {MOST_EXPONENT_BITS} exponent bits"
            )
        scale = self.constant(value.args[1])
        if scale is None:
            raise ModelError("a fake-quantized tensor has a computed scale; export the model in eval mode")
        scales = scale.value.numpy()
        constant = self.constant(value.args[0])
        if constant is not None:
            array, channels = constant.value.numpy(), None if axis < 0 else axis
            rounded = decode(encode(array, scales, layout, channels), scales, layout, channels)
            self.weights[var] = _Weight(rounded, scales.reshape(-1), layout)
        else:
            self.activations[var] = _Activation(self.expression(value.args[0]), layout, float(scales))

    def _mark(
        self, var: relax.Var, value: relax.Call, arguments: list, weight: _Weight, x: _Activation | None
    ) -> None:
        call = relax.Call(value.op, arguments, value.attrs, value.ty_args)
        result = self.builder.emit(call, var.name)
        layout, scale = ("", 0.0) if x is None else (x.layout, x.scale)
        mark = qfp8_ops.trained(result, relax.const(weight.scale), weight.layout, layout, scale)
        self.variables[var] = self.builder.emit(mark, f"{var.name}_trained")


def take_trained(mod: tvm.IRModule, skip: Iterable[str] = ()) -> tuple[tvm.IRModule, QuantizationPlan | None]:
    """The canonical program without marks, and the plan that they make; None where there are none.

    ``skip`` are names or patterns of layers that compute in float32 all the same, with the weights as trained.
    """
    rewriter = _Take(mod)
    if not any(op_name(value) == TRAINED for value in rewriter.definition.values()):
        return mod, None
    mod = rewriter.rewrite()
    marks, program = rewriter.marks, Program(mod)
    steps = find_linear(program, skip)
    plan = QuantizationPlan(trained=True, skipped=steps.skipped)
    unmarked = [*steps.products, *steps.recurrent, *(set(steps.linear) - set(marks))]
    plan.skipped.update(dict.fromkeys(unmarked, LEFT_OUT))
    for name, linear in steps.linear.items():
        if name in marks:
            plan.linear[name] = _linear(linear.weight, linear.weight_axis, *marks[name])
    for name, table in embedding_tables(program).items():
        if name in marks:
            scale, attrs = marks[name]
            layout = str(attrs["weight_layout"])
            plan.embeddings[name] = QTensor(encode(table, scale, layout, 0), scale, layout, 0)
    return mod, plan


class _Take(MainRewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.marks: dict[str, tuple[np.ndarray, tvm.ir.Attrs]] = {}

    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        if op_name(value) != TRAINED:
            self.keep(var, value)
            return
        layer = self.expression(value.args[0])
        self.variables[var] = layer
        self.marks[layer_name(layer)] = value.args[1].value.numpy(), value.attrs


def _linear(weight: np.ndarray, axis: int, scale: np.ndarray, attrs: tvm.ir.Attrs) -> LinearQuantization:
    """The codes again: ``weight`` is on the grid but for rounding, which is far less than half a step."""
    layout, activation = str(attrs["weight_layout"]), str(attrs["activation_layout"])
    scales, channels = (scale.reshape(()), None) if scale.size == 1 else (scale, axis)
    codes = QTensor(encode(weight, scales, layout, channels), scales, layout, channels)
    if not activation:
        return LinearQuantization(codes)
    return LinearQuantization(codes, ActivationQuantization(activation, float(attrs["activation_scale"])))
