"""NNCF's post-training int8, run by OpenVINO: the other quantizer that a user would take for a CPU."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import nncf
import numpy as np
import openvino

from zoo.task import Model, Run

TRANSFORMERS = ("minilm", "ppocrv6", "smollm2")
"""Models with attention, for which NNCF has a mode of its own."""


def nncf_int8(model: Model, samples: int) -> Run:
    """Runner of a model quantized by ``nncf.quantize`` as its documentation advises, on one thread.

    All layers that NNCF quantizes, calibrated on the same samples as QFP8, with fast bias correction (its default) and
    the mixed preset (asymmetric activations, better where they are not ReLU's). What stays float is computed in
    float32: OpenVINO would take bfloat16 on CPUs that have it.
    """
    nncf.set_log_level(logging.ERROR)
    core = openvino.Core()
    read = core.read_model(model.onnx_path())
    read.reshape({name: list(shape) for name, shape in model.input_shapes().items()})
    calibration = model.calibration(samples)
    quantized = nncf.quantize(
        read,
        nncf.Dataset(calibration),
        subset_size=len(calibration),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER if model.NAME in TRANSFORMERS else None,
    )
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(quantized, "CPU", options)
    return functools.partial(_run, compiled)


def _run(compiled: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    found = compiled(dict(inputs))
    return [np.array(found[output]) for output in compiled.outputs]
