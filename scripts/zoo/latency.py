"""What a user would run instead, set up as its own documentation advises, for timing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zoo.fetch import cache_dir
from zoo.peers import int8_path, session

Runner = Callable[[dict], Any]
CALIBRATION_SAMPLES = 64


def dynamic_int8(model: Any) -> Path:
    """onnxruntime's dynamic int8 of the matrix products, weights per channel; its advice for transformers."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = cache_dir("bench") / f"{model.NAME}_dynamic_int8.onnx"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}.onnx")
        quantize_dynamic(
            model.onnx_path(),
            part,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
        part.replace(path)
    return path


def nncf_int8(model: Any, threads: int) -> Runner:
    """OpenVINO's own int8; what NNCF leaves float is in the precision that OpenVINO chooses."""
    from zoo.nncf_peer import nncf_path  # takes seconds, and the other contestants do not need it

    return openvino_runner(nncf_path(model, CALIBRATION_SAMPLES), model.input_shapes(), threads, "")


def openvino_runner(
    path: Path, shapes: dict[str, tuple[int, ...]], threads: int, precision: str = "f32"
) -> Runner:
    """Static shapes, latency hint; ``precision`` as OpenVINO spells it, "" for its own choice."""
    import openvino

    core = openvino.Core()
    network = core.read_model(str(path))
    network.reshape({name: list(shape) for name, shape in shapes.items()})
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    if precision:
        settings["INFERENCE_PRECISION_HINT"] = precision
    compiled = core.compile_model(network, "CPU", settings)
    request = compiled.create_infer_request()
    return lambda inputs: request.infer(inputs)


PEERS: dict[str, Callable[[Any, int], Runner]] = {
    "onnxruntime float32": lambda model, threads: session(model.onnx_path(), threads),
    "onnxruntime int8 dynamic": lambda model, threads: session(dynamic_int8(model), threads),
    "onnxruntime int8 QDQ": lambda model, threads: session(int8_path(model, CALIBRATION_SAMPLES), threads),
    "openvino float32": lambda model, threads: openvino_runner(
        model.onnx_path(), model.input_shapes(), threads
    ),
    # Where the processor multiplies bfloat16, that is what OpenVINO makes of a float32 file.
    "openvino default": lambda model, threads: openvino_runner(
        model.onnx_path(), model.input_shapes(), threads, ""
    ),
    "openvino int8 QDQ": lambda model, threads: openvino_runner(
        int8_path(model, CALIBRATION_SAMPLES), model.input_shapes(), threads
    ),
    "openvino int8 NNCF": nncf_int8,
}
"""Makes the runner of ``(model, threads)``."""
