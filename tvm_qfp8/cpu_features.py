"""CPU features that compiled code may use, and whether a CPU has them.

Within an architecture CPUs differ: a module for Zen 4 stops with an illegal instruction on a CPU without AVX-512.
So a module names the features it was compiled with, and whoever loads or bundles it compares first. Linux reports
features as words in ``/proc/cpuinfo`` on x86, and elsewhere as bits of the auxiliary vector (``getauxval(3)``), which
an emulator sets too. Listed are the features that LLVM uses by itself; others (AES, CRC) occur in no kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from tvm.target import Target

from tvm_qfp8.host_cpu import REPORTED, cpuinfo_flags
from tvm_qfp8.linker import architecture
from tvm_qfp8.targets import cpu_features

HWCAP, HWCAP2 = 16, 26
"""Entries of the auxiliary vector, ``AT_HWCAP`` and ``AT_HWCAP2`` of <elf.h>."""


@dataclass(frozen=True)
class Feature:
    """A CPU feature as Linux reports it: a word of cpuinfo or, with ``entry``, a bit of the auxiliary vector."""

    name: str
    entry: int | None = None
    bit: int = 0


# LLVM's name -> Linux's, with the bits of <asm/hwcap.h> of each architecture.
_X86 = {name: Feature(word) for name, word in REPORTED.items()}
_AARCH64 = {
    "fp-armv8": Feature("fp", HWCAP, 0),
    "neon": Feature("asimd", HWCAP, 1),
    "lse": Feature("atomics", HWCAP, 8),
    "fullfp16": Feature("asimdhp", HWCAP, 10),
    "rdm": Feature("asimdrdm", HWCAP, 12),
    "complxnum": Feature("fcma", HWCAP, 14),
    "sha3": Feature("sha3", HWCAP, 17),
    "dotprod": Feature("asimddp", HWCAP, 20),
    "sve": Feature("sve", HWCAP, 22),
    "fp16fml": Feature("asimdfhm", HWCAP, 23),
    "sve2": Feature("sve2", HWCAP2, 1),
    "i8mm": Feature("i8mm", HWCAP2, 13),
    "bf16": Feature("bf16", HWCAP2, 14),
}
_ARMV7 = {
    "neon": Feature("neon", HWCAP, 12),
    "vfp3": Feature("vfpv3", HWCAP, 13),
    "vfp4": Feature("vfpv4", HWCAP, 16),
}
_RISCV64 = {letter: Feature(letter, HWCAP, ord(letter) - ord("a")) for letter in "mafdcv"}
_FEATURES = {"x86_64": _X86, "aarch64": _AARCH64, "armv7a": _ARMV7, "riscv64": _RISCV64}


def used_features(target: Target) -> list[str]:
    """LLVM's names of the listed features that code for a CPU target may use."""
    found = cpu_features(target)
    return [name for name in _FEATURES.get(architecture(target), {}) if name in found]


def reported_features(architecture_name: str, names: Iterable[str]) -> list[Feature]:
    """How Linux reports the features with these names of LLVM's."""
    known = _FEATURES.get(architecture_name, {})
    return [known[name] for name in names if name in known]


def missing_features(features: Iterable[Feature], flags: Collection[str] | None = None) -> list[str]:
    """Those that this machine lacks, by Linux's names; none where the system reports no features.

    ``flags`` are the words of cpuinfo, by default this machine's.
    """
    flags = cpuinfo_flags() if flags is None else flags
    get = getattr(ctypes.CDLL(None), "getauxval", None)
    missing = []
    for feature in features:
        if feature.entry is None:
            has = not flags or feature.name in flags
        elif get is None:
            has = True
        else:
            get.restype = ctypes.c_ulong
            has = bool(get(ctypes.c_ulong(feature.entry)) >> feature.bit & 1)
        if not has:
            missing.append(feature.name)
    return missing
