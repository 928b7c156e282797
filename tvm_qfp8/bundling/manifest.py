"""The manifest of a bundle: text that a person, the C++ runner and the Python runner read.

One entry a line, the name last since it may hold spaces::

    format 2
    target aarch64 rpi4
    version apache-tvm 0.27.0.post1
    feature asimd 16 1
    file 7c9f...e1 model.so
    program main
    input float32 4 1 3 224 224 image
    output float32 2 1 1000 logits
    end 51d0...7a

Inputs and outputs belong to the ``program`` before them: a module has one for each length that it is compiled for, the
longest last. ``feature`` is what the CPU must have: a word of ``/proc/cpuinfo``, or entry and bit of the auxiliary
vector. The last line holds the SHA-256 of all text before it, so that a changed or cut-off manifest is found out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from tvm_qfp8.cpu_features import Feature
from tvm_qfp8.tensor_info import TensorInfo

NAME = "manifest.txt"
MODULE = "model.so"


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_manifest(
    folder: Path,
    target: str,
    machine: str,
    versions: Mapping[str, str],
    features: Sequence[Feature],
    files: Sequence[str],
    programs: Mapping[str, tuple[Sequence[TensorInfo], Sequence[TensorInfo]]],
) -> None:
    """Write ``manifest.txt``.

    ``files`` are paths inside ``folder``, which get their hashes; ``programs`` are inputs and outputs of each function.
    """
    lines = ["format 2", f"target {machine} {target}"]
    lines += [f"version {name} {number}" for name, number in versions.items()]
    lines += [f"feature {f.name}" + (f" {f.entry} {f.bit}" if f.entry is not None else "") for f in features]
    lines += [f"file {sha256(folder / name)} {name}" for name in files]
    for function, tensors in programs.items():
        lines.append(f"program {function}")
        for kind, infos in zip(("input", "output"), tensors, strict=True):
            lines += [" ".join([kind, t.dtype, str(len(t.shape)), *map(str, t.shape), t.name]) for t in infos]
    text = ("\n".join(lines) + "\n").encode()
    (folder / NAME).write_bytes(text + f"end {hashlib.sha256(text).hexdigest()}\n".encode())
