"""Compiles real models for GPUs with nvcc and records what came out; needs no GPU, and times nothing.

python scripts/cuda_build.py [--models mobilenetv2 minilm] [--keep FOLDER] [--output results/cuda_build.json]

A folder that is asked for gets, for a machine with a GPU of compute capability 9.0, each module with an input and the
outputs that the same model compiled for this CPU gives: what `scripts/bench cuda --modules FOLDER` reads.
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

import numpy as np

import tvm_qfp8
from tvm_qfp8 import cuda_code
from zoo.machine import describe_machine

MODELS = ("mobilenetv2", "minilm")
TARGETS = ("cuda-sm80", "cuda-sm90")
KEPT = "cuda-sm90"
SAMPLES = 4
_KERNEL = re.compile(r'^extern "C" __global__ [^;]*?\{.*?^\}', re.DOTALL | re.MULTILINE)


def build(name: str, target: str, keep: Path | None) -> dict[str, Any]:
    """Kernels, those of them on tensor cores, and bytes of the exported module, which holds machine code."""
    model = importlib.import_module(f"zoo.{name}")
    path, shapes = str(model.onnx_path()), model.input_shapes()
    module = tvm_qfp8.compile(path, target, input_shapes=shapes, calibration=model.calibration(SAMPLES))
    kernels = _KERNEL.findall(cuda_code.cuda_source(module._executable))
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "model.so"
        module.export_library(library)
        data = library.read_bytes()
    if keep is not None and target == KEPT:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{name}.so").write_bytes(data)
        sample = model.calibration(SAMPLES)[0]
        here = tvm_qfp8.compile(path, input_shapes=shapes, calibration=model.calibration(SAMPLES))
        outputs = {f"output {i}": value for i, value in enumerate(here.run(sample))}
        np.savez(keep / f"{name}.npz", **{f"input {key}": value for key, value in sample.items()}, **outputs)
    return {
        "kernels": len(kernels),
        "on_tensor_cores": sum(re.search(r"qfp8_(mma|wgmma)", kernel) is not None for kernel in kernels),
        "module_bytes": len(data),
        "holds_source": b"__global__" in data,
    }


def main() -> None:
    """Build every model for every target and write what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--output", type=Path, default=Path("results/cuda_build.json"))
    options = parser.parse_args()
    compiler = cuda_code.find_nvcc()
    if compiler is None:
        raise SystemExit("cuda_build: no nvcc on PATH")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    record: dict[str, Any] = {"machine": describe_machine(), "nvcc": version.splitlines()[-1], "models": {}}
    for name in options.models:
        record["models"][name] = {target: build(name, target, options.keep) for target in TARGETS}
        print(name, record["models"][name])
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
