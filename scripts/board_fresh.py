"""Real models from a fresh environment to emulated 64-bit Arm, by the commands that a user would type.

    python scripts/board_fresh.py [--models mobilenetv2 minilm] [--output results/board_fresh.json]

Makes a virtual environment, installs this package and the extra ``board`` with pip, nothing else, and calls
``tvm-qfp8 compile`` and ``bundle`` there. The C++ runner's outputs under qemu are compared bit for bit with those of
``tvm-qfp8 run`` on x86. One model is bundled for every architecture by the same command. Needs qemu-aarch64-static.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import numpy as np
from board_proof import ARM, SAMPLES, X86, bits, run_bundle

from zoo.machine import describe_machine

MODELS = ("mobilenetv2", "minilm")
ARCHITECTURES = (X86, ARM, "armv7", "riscv64")
REPOSITORY = Path(__file__).resolve().parent.parent


class Environment:
    """A virtual environment that holds this package and what pip brought with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        source = folder / "source"
        # pip builds where the source lies.
        shutil.copytree(REPOSITORY, source, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv"))
        venv.create(folder / "venv", with_pip=True)
        self._call("pip", "install", "--quiet", "--disable-pip-version-check", f"{source}[board]")

    def _call(self, program: str, *arguments: Any) -> str:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        command = [str(self.folder / "venv" / "bin" / program), *map(str, arguments)]
        found = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        if found.returncode:
            raise SystemExit(f"{' '.join(command)}\n{found.stdout}{found.stderr}")
        return found.stdout

    def tvm_qfp8(self, *arguments: Any) -> str:
        """What the command ``tvm-qfp8`` prints."""
        return self._call("tvm-qfp8", *arguments)


def compile_for(here: Environment, name: str, target: str) -> Path:
    """The module of a model for a target, made in the environment."""
    model = importlib.import_module(f"zoo.{name}")
    samples = [sample for sample, _ in zip(model.calibration(SAMPLES), range(SAMPLES), strict=False)]
    data, module = here.folder / f"{name}.npz", here.folder / f"{name}-{target}.so"
    np.savez(data, **{key: np.concatenate([sample[key] for sample in samples]) for key in samples[0]})
    shapes = [f"--input-shape={key}={','.join(map(str, s))}" for key, s in model.input_shapes().items()]
    here.tvm_qfp8("compile", model.onnx_path(), "-c", data, *shapes, "--target", target, "-o", module)
    return module


def bundle_for(here: Environment, module: Path, target: str) -> Path:
    """The module's bundle."""
    folder = here.folder / f"{module.stem}-bundle"
    here.tvm_qfp8("bundle", module, "--target", target, "-o", folder)
    return folder


def prove(here: Environment, name: str) -> dict[str, Any]:
    """Values compared and how many differ between x86 and the bundle under qemu."""
    inputs = next(iter(importlib.import_module(f"zoo.{name}").probes(quick=True)))
    np.savez(here.folder / "inputs.npz", **inputs)
    x86 = compile_for(here, name, X86)
    here.tvm_qfp8("run", x86, "--input", here.folder / "inputs.npz", "-o", here.folder / "outputs.npz")
    folder = bundle_for(here, compile_for(here, name, ARM), ARM)
    lines = [line.split() for line in (folder / "manifest.txt").read_text().splitlines()]
    order = [line[-1] for line in lines if line[0] == "input"]
    with np.load(here.folder / "outputs.npz") as archive:
        expected = [archive[key] for key in archive.files]
    found = run_bundle(folder, [inputs[key] for key in order], len(expected))
    pairs = list(zip(expected, found, strict=True))
    different = sum(int((bits(ours) != bits(theirs)).sum()) for ours, theirs in pairs)
    return {"values": sum(ours.size for ours in expected), "different": different, "equal": different == 0}


def main() -> None:
    """Prove each model, bundle the first one for every architecture, and write what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--output", type=Path, default=Path("results/board_fresh.json"))
    options = parser.parse_args()
    record: dict[str, Any] = {"machine": describe_machine(), "arm": ARM, "x86": X86, "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        here = Environment(Path(folder))
        for name in options.models:
            record["models"][name] = prove(here, name)
            print(name, record["models"][name], file=sys.stderr)
        bundles = record["bundles"] = {}
        for target in ARCHITECTURES:
            path = here.folder / f"{MODELS[0]}-{target}-bundle"
            if not path.exists():
                path = bundle_for(here, compile_for(here, MODELS[0], target), target)
            bundles[target] = {
                "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
                "runner": (path / "run").exists(),
                "runtime": sorted(file.name for file in (path / "lib").iterdir()),
            }
            print(target, bundles[target], file=sys.stderr)
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    if not all(found["equal"] for found in record["models"].values()):
        raise SystemExit("outputs differ")


if __name__ == "__main__":
    main()
