"""NNCF's post-training int8, run by OpenVINO: the other quantizer that a user would take for a CPU."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino

from zoo import fetch
from zoo.task import Model, Run

TRANSFORMERS = ("minilm", "ppocrv6", "smollm2")
"""Models with attention, for which NNCF has a mode of its own."""


def nncf_path(model: Model, samples: int) -> Path:
    """A model quantized by ``nncf.quantize`` as its documentation advises, made when missing.

    All layers that NNCF quantizes, calibrated on the same samples as QFP8, with fast bias correction (its default) and
    the mixed preset (asymmetric activations, better where they are not ReLU's).
    """
    path = fetch.cache_dir("int8") / f"{model.NAME}-nncf-{nncf.__version__}-{samples}.xml"
    if path.exists():
        return path
    nncf.set_log_level(logging.ERROR)
    read = openvino.Core().read_model(model.onnx_path())
    read.reshape({name: list(shape) for name, shape in model.input_shapes().items()})
    calibration = model.calibration(samples)
    quantized = nncf.quantize(
        read,
        nncf.Dataset(calibration),
        subset_size=len(calibration),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER if model.NAME in TRANSFORMERS else None,
    )
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, path.name)
        openvino.save_model(quantized, made, compress_to_fp16=False)
        for suffix in (".bin", ".xml"):
            made.with_suffix(suffix).replace(path.with_suffix(suffix))
    return path


def nncf_int8(model: Model, samples: int) -> Run:
    """Runner of ``nncf_path`` on one thread.

    What stays float is computed in float32: OpenVINO would take bfloat16 on CPUs that have it.
    """
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(nncf_path(model, samples)), "CPU", options)
    return functools.partial(_run, compiled)


def _run(compiled: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    found = compiled(dict(inputs))
    return [np.array(found[output]) for output in compiled.outputs]
