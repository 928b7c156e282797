"""Fills the report from the canonical program and the calibration's plan."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.calibration.contents import Contents, contents
from tvm_qfp8.calibration.linear import LINEAR, input_axis
from tvm_qfp8.calibration.plan import QuantizationPlan
from tvm_qfp8.calibration.recurrent_layer import RECURRENT
from tvm_qfp8.config import Config
from tvm_qfp8.distribution import distribution_of
from tvm_qfp8.layer_names import layer_name
from tvm_qfp8.relay_passes.fuse import is_row_operator, op_name
from tvm_qfp8.relay_passes.interpolate import called_function
from tvm_qfp8.relay_passes.tabulate_codes import code_chains, is_tabulated
from tvm_qfp8.report import LayerReport, Report
from tvm_qfp8.tables import build_table

FEW_SAMPLES = 16
"""Fewer leave a gap between them and other inputs."""


def describe(
    canonical: tvm.IRModule,
    plan: QuantizationPlan,
    config: Config,
    target: tvm.target.Target | str,
    notes: list[str],
) -> Report:
    """The report of a compilation."""
    report = Report(target=str(target), notes=list(notes), max_error=config.max_error)
    if plan.trained:
        report.notes.append("layouts and scales are those of quantization-aware training")
    elif plan.samples == 0:
        report.notes.append(_note_without_samples(plan))
    elif plan.samples < FEW_SAMPLES:
        samples = f"{plan.samples} sample{'s' * (plan.samples > 1)}"
        report.notes.append(
            f"{samples} decided layouts, scales and biases, so that they fit these better than other inputs: "
            "32 to 64 give what the network's accuracy allows"
        )
    chains = code_chains(canonical)
    first: dict[tuple[Contents, int | None], str] = {}
    for block in canonical["main"].body.blocks:
        for binding in block.bindings:
            layer = _layer(binding.var, binding.value, plan, config)
            if layer is not None and op_name(binding.value) in (*LINEAR, RECURRENT):
                layer = _with_weight_once(layer, binding.value, plan, first)
            if layer is not None and is_tabulated(chains.get(binding.var)):
                layer = LayerReport(layer.name, layer.operator, "in a table of 256 codes, exact")
            if layer is not None:
                report.layers.append(layer)
    before = sum(layer.bytes_before for layer in report.layers)
    after = sum(layer.bytes_after for layer in report.layers)
    if before:
        report.totals["weight bytes"] = f"{before} -> {after} ({after / before:.3f})"
    return report


def _note_without_samples(plan: QuantizationPlan) -> str:
    layers = len(plan.linear)
    encoded = sum(layer.activation is not None for layer in plan.linear.values())
    if not encoded:
        return (
            "no calibration data: only weights are quantized, activations stay float32; the module is smaller, but "
            "integer kernels, which are the fast ones, need samples"
        )
    return (
        f"no calibration data: {encoded} of {layers} linear layers read codes, whose scales are known limits or found "
        "at run time; with samples those that read float32 are faster, and most others"
    )


def _with_weight_once(
    layer: LayerReport,
    value: relax.Call,
    plan: QuantizationPlan,
    first: dict[tuple[Contents, int | None], str],
) -> LayerReport:
    """Layers that share a weight have its bytes once: the ``first`` has them."""
    weights = _weights(value)
    if not weights:
        return layer
    codes = plan.linear.get(layer.name)
    held = contents(weights[0].value.numpy()), None if codes is None else id(codes.weight)
    owner = first.setdefault(held, layer.name)
    if owner == layer.name:
        return layer
    note = f"weights of {owner}" + (f"; {layer.reason}" if layer.reason else "")
    return replace(layer, bytes_before=0, bytes_after=0, reason=note)


def _weights(value: relax.Call) -> list[GenericConst]:
    """The constants that a linear operator multiplies with; of a recurrent layer its other arguments are small."""
    arguments = value.args[1:2] if op_name(value) == RECURRENT else value.args
    return [argument for argument in arguments if isinstance(argument, GenericConst)]


def _layer(var: relax.Var, value: relax.Expr, plan: QuantizationPlan, config: Config) -> LayerReport | None:
    name, layer = op_name(value), layer_name(var)
    short = name.removeprefix("relax.").removeprefix("nn.")
    if name in LINEAR:
        return _linear(layer, value, short, plan)
    if name == RECURRENT:
        return _linear(layer, value, str(value.attrs["kind"]).lower(), plan)
    if layer in plan.embeddings:
        codes, scale = plan.embeddings[layer].codes, plan.embeddings[layer].scale
        after = codes.nbytes + scale.nbytes
        return LayerReport(layer, short, "QFP8 table", "E2M5", bytes_before=4 * codes.size, bytes_after=after)
    function = called_function(value)
    if function is not None:
        table = build_table(function, max_error=config.max_error)
        kind = "relative error" if table.relative else "error"
        became = f"table {function}, {kind} <= {table.max_error:.1e}"
        return LayerReport(layer, short, became, function=function)
    if is_row_operator(value):
        inside = "exact root inside"
        if "softmax" in name:
            inside = f"exp table inside, error <= {config.max_error:.1e}"
        return LayerReport(layer, short, f"fused row kernel, {inside}")
    return None


def _linear(layer: str, value: relax.Call, short: str, plan: QuantizationPlan) -> LayerReport:
    if layer in plan.products:
        x, y = plan.products[layer]
        return LayerReport(layer, short, f"QFP8 {x.described} x {y.described}", y.described, x.described)
    quantization = plan.linear.get(layer)
    constants = [weight.value.numpy() for weight in _weights(value)]
    before = sum(array.nbytes for array in constants)
    if quantization is None:
        reason = plan.skipped.get(layer, "no constant weight")
        return LayerReport(layer, short, "float32", bytes_before=before, bytes_after=before, reason=reason)
    activation = quantization.activation
    scale = None if activation is None else activation.scale
    weight = quantization.weight
    shape = [-1 if axis == weight.axis else 1 for axis in range(weight.codes.ndim)]
    # As it meets the activation the weight lies on the grid.
    real = constants[0]
    if activation is not None and activation.changes_weights:
        real = activation.met_by(real, input_axis(op_name(value), value.attrs))
    steps = real / np.asarray(weight.scale).reshape(shape if weight.axis is not None else ())
    after = quantization.weight.codes.nbytes + np.asarray(quantization.weight.scale).nbytes
    kind = "QFP8 weights" if activation is None else "QFP8"
    activation_layout = "float32" if activation is None else activation.described
    return LayerReport(
        layer,
        short,
        kind,
        quantization.weight.layout,
        activation_layout,
        -math.log2(scale) if scale else None,
        quantization.sqnr_db,
        before,
        after,
        quantization.note,
        weights=distribution_of(steps),
        activations=quantization.received,
    )
