"""What a user would run instead: onnxruntime in float32, and its static int8 as its documentation advises."""

from __future__ import annotations

import functools
import logging
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter
import onnxruntime
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quant_pre_process,
    quantize_static,
)
from onnxruntime.tools.onnx_model_utils import make_input_shape_fixed

from zoo import fetch
from zoo.task import Model, Run

PER_CHANNEL_OPSET = 13
LINEAR = ["Conv", "MatMul", "Gemm"]


def session(path: Path, threads: int = 1) -> Run:
    """Runner of an ONNX file on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    built = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return functools.partial(built.run, None)


@functools.cache
def has_vnni() -> bool:
    """Whether this CPU adds int8 products without saturating int16: x86 with VNNI, or not x86."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    return bool(flags & {"avx512_vnni", "avx_vnni"})


class _Reader(CalibrationDataReader):
    def __init__(self, samples: list[dict[str, np.ndarray]]) -> None:
        self._samples: Iterator[dict[str, np.ndarray]] = iter(samples)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._samples, None)


def int8_path(model: Model, samples: int) -> Path:
    """Static QDQ int8 of a model's Conv, MatMul and Gemm, made when missing.

    Weights int8 per output channel, activations uint8 per tensor by range, calibrated on the same `samples` as QFP8;
    the file is first cleaned by `quant_pre_process` (which folds BatchNorm), with static shapes. Weights have 7 bits
    where the CPU lacks VNNI (`reduce_range`), else its int16 sums saturate.
    """
    name = f"{model.NAME}-{onnxruntime.__version__}-{samples}{'' if has_vnni() else '-7bit'}.onnx"
    path = fetch.cache_dir("int8") / name
    if path.exists():
        return path
    raw = onnx.load(model.onnx_path())
    if next(o.version for o in raw.opset_import if not o.domain) < PER_CHANNEL_OPSET:
        raw = onnx.version_converter.convert_version(raw, PER_CHANNEL_OPSET)
    for value, shape in model.input_shapes().items():
        make_input_shape_fixed(raw.graph, value, shape)
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        prepared, quantized = Path(folder, "prepared.onnx"), Path(folder, "int8.onnx")
        quant_pre_process(raw, prepared)
        quantize_static(
            prepared,
            quantized,
            _Reader(model.calibration(samples)),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=LINEAR,
            per_channel=True,
            reduce_range=not has_vnni(),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        fetch.write_atomically(path, quantized.read_bytes())
    return path
