"""The CPU this process runs on, as an LLVM target configuration."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from tvm.target import Target, codegen

# LLVM names the CPU by family and model. A hypervisor may hide features of that model, and a model too new for
# LLVM has features it does not list, so these are compared with what the kernel reports: LLVM name -> cpuinfo name.
REPORTED = {
    "sse2": "sse2",
    "sse3": "pni",
    "ssse3": "ssse3",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "popcnt": "popcnt",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "lzcnt": "abm",
    "sse4a": "sse4a",
    "movbe": "movbe",
    "avx": "avx",
    "f16c": "f16c",
    "fma": "fma",
    "avx2": "avx2",
    "avxvnni": "avx_vnni",
    "gfni": "gfni",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "amx-tile": "amx_tile",
    "amx-int8": "amx_int8",
    "amx-bf16": "amx_bf16",
}


@functools.cache
def host_cpu() -> dict[str, Any]:
    """Configuration ``{kind, mtriple, mcpu, mattr, num-cores}`` of this machine.

    ``mattr`` holds only the differences between LLVM's idea of the CPU and the features that Linux reports.
    """
    config: dict[str, Any] = {
        "kind": "llvm",
        "mtriple": str(codegen.llvm_get_system_triple()),
        "mcpu": str(codegen.llvm_get_system_cpu()),
        "num-cores": usable_cores(),
    }
    if config["mtriple"].startswith("x86_64"):
        known = {str(feature) for feature in codegen.llvm_get_cpu_features(Target(config))}
        corrections = feature_corrections(known, cpuinfo_flags())
        if corrections:
            config["mattr"] = corrections
    return config


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpuinfo_flags(path: str | os.PathLike = "/proc/cpuinfo") -> set[str]:
    """Feature flags of the first CPU in Linux's cpuinfo; empty where there is no such file."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    for line in text.splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def feature_corrections(known: set[str], flags: set[str]) -> list[str]:
    """``["+feature", "-feature"]`` that turn LLVM's ``known`` features into those of ``flags``."""
    if not flags:
        return []
    corrections = []
    for feature, flag in REPORTED.items():
        if (feature in known) != (flag in flags):
            corrections.append(("-" if feature in known else "+") + feature)
    return corrections
