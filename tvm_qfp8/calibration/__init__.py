"""Calibration: run a module on samples, choose layouts and scales, correct biases."""

from tvm_qfp8.calibration.batchnorm import estimate_batchnorms
from tvm_qfp8.calibration.calibrate import calibrate
from tvm_qfp8.calibration.evaluate import Program, evaluate
from tvm_qfp8.calibration.max_drop import Metric, keep_within
from tvm_qfp8.calibration.output_sqnr import output_sqnr
from tvm_qfp8.calibration.plan import LinearQuantization, QuantizationPlan
from tvm_qfp8.calibration.quantized import QuantizedProgram, evaluate_quantized
from tvm_qfp8.calibration.samples import first_samples, padded_samples
from tvm_qfp8.calibration.sensitivity import layer_effects
from tvm_qfp8.calibration.stored_samples import StoredSamples
from tvm_qfp8.layer_effect import LayerEffect

__all__ = [
    "LayerEffect",
    "LinearQuantization",
    "Metric",
    "Program",
    "QuantizationPlan",
    "QuantizedProgram",
    "StoredSamples",
    "calibrate",
    "estimate_batchnorms",
    "evaluate",
    "evaluate_quantized",
    "first_samples",
    "keep_within",
    "layer_effects",
    "output_sqnr",
    "padded_samples",
]
