"""Compiles real models for GPUs with nvcc and records what came out; needs no GPU, and times nothing.

python scripts/cuda_build.py [--models mobilenetv2 minilm] [--output results/cuda_build.json]
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import tvm_qfp8
from tvm_qfp8 import cuda_code
from zoo.machine import describe_machine

MODELS = ("mobilenetv2", "minilm")
TARGETS = ("cuda-sm80", "cuda-sm90")
SAMPLES = 4
_KERNEL = re.compile(r'^extern "C" __global__ [^;]*?\{.*?^\}', re.DOTALL | re.MULTILINE)


def build(name: str, target: str) -> dict[str, Any]:
    """Kernels, those of them on tensor cores, and bytes of the exported module, which holds machine code."""
    model = importlib.import_module(f"zoo.{name}")
    path, shapes = str(model.onnx_path()), model.input_shapes()
    module = tvm_qfp8.compile(path, target, input_shapes=shapes, calibration=model.calibration(SAMPLES))
    kernels = _KERNEL.findall(cuda_code.cuda_source(module._executable))
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "model.so"
        module.export_library(library)
        data = library.read_bytes()
    return {
        "kernels": len(kernels),
        "on_tensor_cores": sum("qfp8_mma(" in kernel for kernel in kernels),
        "module_bytes": len(data),
        "holds_source": b"__global__" in data,
    }


def main() -> None:
    """Build every model for every target and write what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--output", type=Path, default=Path("results/cuda_build.json"))
    options = parser.parse_args()
    compiler = cuda_code.find_nvcc()
    if compiler is None:
        raise SystemExit("cuda_build: no nvcc on PATH")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    record: dict[str, Any] = {"machine": describe_machine(), "nvcc": version.splitlines()[-1], "models": {}}
    for name in options.models:
        record["models"][name] = {target: build(name, target) for target in TARGETS}
        print(name, record["models"][name])
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
