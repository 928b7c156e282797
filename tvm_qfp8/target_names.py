"""Names of targets that a person would type, and what each stands for."""

from __future__ import annotations

from typing import Any

AARCH64 = "aarch64-linux-gnu"
X86 = "x86_64-linux-gnu"
ARMV7 = "armv7a-linux-gnueabihf"
RISCV64 = "riscv64-linux-gnu"


CUDA_LIMITS = {"max_shared_memory_per_block": 49152, "max_threads_per_block": 1024, "thread_warp_size": 32}
"""What every GPU has without asking for more."""


def _x86(cpu: str) -> dict[str, Any]:
    return {"kind": "llvm", "mtriple": X86, "mcpu": cpu}


def _arm(cpu: str, cores: int = 0) -> dict[str, Any]:
    return {"kind": "llvm", "mtriple": AARCH64, "mcpu": cpu} | ({"num-cores": cores} if cores else {})


def _cuda(arch: str, host: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"kind": "cuda", "arch": arch} | ({"host": host} if host else {})


TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "native": ("this machine", {"kind": "llvm"}),
    "x86-64": ("any 64-bit x86 (SSE2)", _x86("x86-64")),
    "x86-64-v2": ("x86 since about 2009 (SSE4.2)", _x86("x86-64-v2")),
    "x86-64-v3": ("x86 since about 2013 (AVX2)", _x86("x86-64-v3")),
    "x86-64-v4": ("x86 servers (AVX-512)", _x86("x86-64-v4")),
    "skylake-avx512": ("Intel Skylake server", _x86("skylake-avx512")),
    "icelake-server": ("Intel Ice Lake server (VNNI)", _x86("icelake-server")),
    "sapphirerapids": ("Intel Sapphire Rapids", _x86("sapphirerapids")),
    "alderlake": ("Intel Alder Lake (AVX-VNNI)", _x86("alderlake")),
    "znver3": ("AMD Zen 3", _x86("znver3")),
    "znver4": ("AMD Zen 4 (AVX-512 VNNI)", _x86("znver4")),
    "aarch64": ("any 64-bit Arm (NEON)", {"kind": "llvm", "mtriple": AARCH64}),
    "rpi3": ("Raspberry Pi 3, 64-bit system", _arm("cortex-a53", 4)),
    "rpi4": ("Raspberry Pi 4, 64-bit system", _arm("cortex-a72", 4)),
    "rpi5": ("Raspberry Pi 5", _arm("cortex-a76", 4)),
    "cortex-a53": ("Arm Cortex-A53", _arm("cortex-a53")),
    "cortex-a72": ("Arm Cortex-A72", _arm("cortex-a72")),
    "cortex-a76": ("Arm Cortex-A76 (dot product)", _arm("cortex-a76")),
    "graviton2": ("AWS Graviton2", _arm("neoverse-n1")),
    "graviton3": ("AWS Graviton3", _arm("neoverse-v1")),
    "graviton4": ("AWS Graviton4", _arm("neoverse-v2")),
    "armv7": ("32-bit Arm with NEON, hard float", {"kind": "llvm", "mtriple": ARMV7}),
    "riscv64": ("RISC-V RV64GC", {"kind": "llvm", "mtriple": RISCV64}),
    "jetson-orin": ("NVIDIA Jetson Orin", _cuda("sm_87", _arm("cortex-a78ae", 12))),
    "cuda-sm80": ("NVIDIA A100", _cuda("sm_80")),
    "cuda-sm86": ("NVIDIA RTX 30 series, A10", _cuda("sm_86")),
    "cuda-sm89": ("NVIDIA RTX 40 series, L4", _cuda("sm_89")),
    "cuda-sm90": ("NVIDIA H100, H200", _cuda("sm_90")),
}
"""Name -> (what it is, configuration)."""

# An architecture alone, or one that LLVM cannot link for as written, becomes the triple that people mean.
TRIPLES = {
    "aarch64": AARCH64,
    "arm64": AARCH64,
    "x86_64": X86,
    "x86-64": X86,
    "amd64": X86,
    "riscv64": RISCV64,
    "armv7": ARMV7,
    "armv7a": ARMV7,
    "armv7l": ARMV7,
}
"""What is written as ``mtriple`` -> the triple."""
