"""Which machine and versions a figure was measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = ("apache-tvm", "apache-tvm-ffi", "numpy", "onnx", "onnxruntime", "openvino")


def describe_machine() -> dict[str, Any]:
    """CPU, cores, instruction set, Python and package versions, date."""
    from tvm_qfp8 import __version__
    from tvm_qfp8.targets import cpu_features, has_vnni, isa, parse_target
    from tvm_qfp8.topi.isa import instruction_set

    native = parse_target("native")
    extensions = "+vnni" if has_vnni(native) else ""
    if instruction_set(isa(native), cpu_features(native)).tiles:
        extensions += "+amx"
    versions = {"tvm-qfp8": __version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _cpu(),
        "mcpu": str(native.attrs.get("mcpu", "")),
        "instruction_set": isa(native) + extensions,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
