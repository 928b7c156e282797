"""Calibration: run a module on samples, choose layouts and scales, correct biases."""

from tvm_qfp8.calibration.calibrate import calibrate
from tvm_qfp8.calibration.evaluate import evaluate
from tvm_qfp8.calibration.plan import LinearQuantization, QuantizationPlan
from tvm_qfp8.calibration.quantized import QuantizedProgram, evaluate_quantized

__all__ = [
    "LinearQuantization",
    "QuantizationPlan",
    "QuantizedProgram",
    "calibrate",
    "evaluate",
    "evaluate_quantized",
]
