"""Compiles real models for 64-bit Arm, bundles them, runs them under qemu and compares with x86 bit for bit.

    python scripts/board_proof.py [--models mobilenetv2 minilm] [--output results/board.json]

Needs ziglang and qemu-aarch64-static. Only sizes and equality are results: an emulator's times say nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import tvm_qfp8
from zoo.machine import describe_machine

MODELS = ("mobilenetv2", "minilm")
ARM, X86 = "rpi4", "x86-64-v3"
SAMPLES = 4
"""Few: they decide how good the numbers are, not whether two machines get the same ones."""
QEMU = ("qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu")


def main() -> None:
    """Prove each model and write what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--output", type=Path, default=Path("results/board.json"))
    options = parser.parse_args()
    record: dict[str, Any] = {"machine": describe_machine(), "arm": ARM, "x86": X86, "models": {}}
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            record["models"][name] = found = prove(name, Path(folder))
        print(name, found)
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    if not all(found["equal"] for found in record["models"].values()):
        raise SystemExit("outputs differ")


def prove(name: str, folder: Path, probes: int = 2) -> dict[str, Any]:
    """Sizes in bytes, and whether the bundle's C++ runner under qemu gives the bits of the x86 module.

    Returns
    -------
    dict
        ``module_bytes``, ``runtime_bytes``, ``bundle_bytes``, ``probes``, ``values`` compared, ``different`` of them
        and ``equal``.
    """
    model = importlib.import_module(f"zoo.{name}")
    here, arm = (_compile(model, target) for target in (X86, ARM))
    arm.export_library(folder / "model.so")
    bundle = tvm_qfp8.bundle(folder / "model.so", folder / "bundle", ARM)
    values = different = 0
    for inputs in model.probes(quick=True)[:probes]:
        expected = here.run(inputs)
        found = run_bundle(bundle, [inputs[info.name] for info in here.inputs], len(expected))
        for ours, theirs in zip(expected, found, strict=True):
            if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
                raise ValueError(f"{name}: {theirs.dtype} {theirs.shape} from the bundle, {ours.shape} here")
            values += ours.size
            different += int((bits(ours) != bits(theirs)).sum())
    return {
        "module_bytes": (bundle / "model.so").stat().st_size,
        "runtime_bytes": sum(path.stat().st_size for path in (bundle / "lib").iterdir()),
        "bundle_bytes": sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()),
        "probes": probes,
        "values": values,
        "different": different,
        "equal": different == 0,
    }


def run_bundle(bundle: Path, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """Outputs of the bundle's C++ runner, under qemu in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        for index, array in enumerate(inputs):
            np.save(f"{folder}/{index}.npy", array)
        names = [f"{index}.npy" for index in range(len(inputs))]
        subprocess.run([*QEMU, bundle / "run", *names], cwd=folder, check=True, capture_output=True)
        return [np.load(f"{folder}/output_{index}.npy") for index in range(outputs)]


def _compile(model: Any, target: str) -> tvm_qfp8.CompiledModule:
    path, shapes = str(model.onnx_path()), model.input_shapes()
    return tvm_qfp8.compile(path, target, input_shapes=shapes, calibration=model.calibration(SAMPLES))


def bits(array: np.ndarray) -> np.ndarray:
    """Values as unsigned integers, so that -0 differs from 0 and NaN equals itself."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


if __name__ == "__main__":
    main()
