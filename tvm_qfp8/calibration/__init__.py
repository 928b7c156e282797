"""Calibration: run a module on samples, choose layouts and scales, correct biases."""

from tvm_qfp8.calibration.byte_layouts import choose_byte_layouts
from tvm_qfp8.calibration.calibrate import calibrate
from tvm_qfp8.calibration.evaluate import Program, evaluate
from tvm_qfp8.calibration.max_drop import Metric, keep_within
from tvm_qfp8.calibration.plan import LinearQuantization, QuantizationPlan
from tvm_qfp8.calibration.quantized import QuantizedProgram, evaluate_quantized
from tvm_qfp8.calibration.samples import first_samples
from tvm_qfp8.calibration.sensitivity import LayerEffect, layer_effects

__all__ = [
    "LayerEffect",
    "LinearQuantization",
    "Metric",
    "Program",
    "QuantizationPlan",
    "QuantizedProgram",
    "calibrate",
    "choose_byte_layouts",
    "evaluate",
    "evaluate_quantized",
    "first_samples",
    "keep_within",
    "layer_effects",
]
