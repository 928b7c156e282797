"""Runs generated CUDA kernels on a CPU (cuda_emulator.h): what they compute is checked without a GPU."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tvm

TARGET = {
    "kind": "cuda",
    "arch": "sm_80",
    "max_shared_memory_per_block": 49152,
    "max_threads_per_block": 1024,
    "thread_warp_size": 32,
    "host": {"kind": "llvm"},
}
_KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\((\d+)\) (\w+)\(([^)]*)\) \{')
_LAUNCH = re.compile(r'launch_thread\("(blockIdx|threadIdx)\.([xyz])", (\d+)\)')


def cuda_source(function: tvm.tirx.PrimFunc) -> str:
    """The CUDA C of a kernel."""
    target = tvm.target.Target(TARGET)
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    with target:
        return tvm.compile(module, target=target).mod.imports[0].inspect_source()


def launches(function: tvm.tirx.PrimFunc) -> list[tuple[tuple[int, int, int], int]]:
    """(grid, threads) of each launch of a function."""
    found: list[tuple[list[int], int]] = []
    grid = [1, 1, 1]
    for kind, axis, extent in _LAUNCH.findall(function.script()):
        if kind == "blockIdx":
            if axis == "x":
                grid = [1, 1, 1]
            grid["xyz".index(axis)] = int(extent)
        else:
            found.append((grid, int(extent)))
    return [((g[0], g[1], g[2]), threads) for g, threads in found]


def run_kernel(function: tvm.tirx.PrimFunc, arrays: Sequence[np.ndarray], folder: Path) -> None:
    """Run a function whose arguments are ``p0, p1, ...``; outputs are written in place."""
    source = cuda_source(function)
    kernels = list(_KERNEL.finditer(source))
    shapes = launches(function)
    assert len(kernels) == len(shapes), (len(kernels), shapes)
    body = source[source.index("#define ushort unsigned short\n#endif") :].partition("#endif")[2]
    body = body.replace("__shared__ alignas(64)", "alignas(64) __shared__")
    body = re.sub(r"asm volatile\(.*?\);", "emulated_mma(c, a0, a1, a2, a3, b0, b1);", body, flags=re.DOTALL)
    calls = []
    for match, (grid, threads) in zip(kernels, shapes, strict=True):
        parameters = [p.replace("__restrict__", "").split() for p in match[3].split(",")]
        values = [f"({kind})values[{name.removeprefix('p').partition('_')[0]}]" for kind, name in parameters]
        run = f"[](void** values) {{ {match[2]}({', '.join(values)}); }}"
        calls.append(f"emulator::Launch({run}, values, {{{', '.join(map(str, grid))}}}, {threads});")
    main = 'extern "C" void run(void** values) {\n' + "\n".join(calls) + "\n}\n"
    (folder / "kernel.cc").write_text(f'#include "cuda_emulator.h"\n{body}\n{main}')
    library = folder / f"kernel{len(list(folder.glob('kernel*.so')))}.so"
    command = [
        "g++",
        "-std=c++20",
        "-O1",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        "-shared",
        "-fPIC",
        "-w",
    ]
    include = f"-I{Path(__file__).parent}"
    subprocess.run([*command, include, "-o", library, folder / "kernel.cc"], check=True)
    pointers = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
    ctypes.CDLL(str(library)).run(pointers)
