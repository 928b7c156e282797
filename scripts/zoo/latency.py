"""What a user would run instead, set up as its own documentation advises, for timing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zoo.fetch import cache_dir

Runner = Callable[[dict], Any]


def onnxruntime_runner(path: Path, threads: int) -> Runner:
    """All graph optimisations (the default), a fixed number of threads in an operator."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)


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


def openvino_runner(path: Path, shapes: dict[str, tuple[int, ...]], threads: int) -> Runner:
    """Static shapes, latency hint, float32 inference."""
    import openvino

    core = openvino.Core()
    network = core.read_model(str(path))
    network.reshape({name: list(shape) for name, shape in shapes.items()})
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(network, "CPU", settings)
    request = compiled.create_infer_request()
    return lambda inputs: request.infer(inputs)


def latency_peers(model: Any, threads: int, static_int8: Path | None = None) -> dict[str, Runner]:
    """Runners by name; ``static_int8`` is a QDQ model to time as well."""
    path = model.onnx_path()
    runners = {"onnxruntime float32": onnxruntime_runner(path, threads)}
    runners["onnxruntime int8 dynamic"] = onnxruntime_runner(dynamic_int8(model), threads)
    if static_int8 is not None:
        runners["onnxruntime int8 QDQ"] = onnxruntime_runner(static_int8, threads)
    try:
        runners["openvino float32"] = openvino_runner(path, model.input_shapes(), threads)
    except ImportError:
        pass
    return runners
