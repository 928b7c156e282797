"""Runs generated CUDA kernels on a CPU (cuda_emulator.h): what they compute is checked without a GPU."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

TARGET = {
    "kind": "cuda",
    "arch": "sm_80",
    "max_shared_memory_per_block": 49152,
    "max_threads_per_block": 1024,
    "thread_warp_size": 32,
    "host": {"kind": "llvm"},
}
_KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\((\d+)\) (\w+)\(([^)]*)\) \{')
_DEVICE_FUNCTION = re.compile(
    r"^__forceinline__ __device__ [^\n]*qfp8_\w+\([^)]*\) \{\n.*?^\}\n", re.DOTALL | re.MULTILINE
)
_LAUNCH = re.compile(
    r'launch_thread\("(?P<name>\w+)\.(?P<axis>[xyz])", (?P<extent>\d+)\)'
    r'|thread_binding\((?:T\.int64\()?(?P<extent2>\d+)\)?, thread="(?P<name2>\w+)\.(?P<axis2>[xyz])"\)'
)


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
    for match in _LAUNCH.finditer(function.script()):
        kind, axis = match["name"] or match["name2"], match["axis"] or match["axis2"]
        extent = match["extent"] or match["extent2"]
        if kind == "blockIdx":
            if axis == "x":
                grid = [1, 1, 1]
            grid["xyz".index(axis)] = int(extent)
        else:
            found.append((grid, int(extent)))
    return [((g[0], g[1], g[2]), threads) for g, threads in found]


def run_kernel(function: tvm.tirx.PrimFunc, arrays: Sequence[np.ndarray], folder: Path) -> None:
    """Run a function on arrays in the order of its parameters; outputs are written in place."""
    source = cuda_source(function)
    kernels = list(_KERNEL.finditer(source))
    shapes = launches(function)
    assert len(kernels) == len(shapes), (len(kernels), shapes)
    body = source[source.index("#define ushort unsigned short\n#endif") :].partition("#endif")[2]
    body = body.replace("__shared__ alignas(64)", "alignas(64) __shared__")
    body = re.sub(r"extern __shared__ __align__\(64\) (\w+) (\w+)\[\];", r"static \1 \2[1 << 16];", body)
    # What is written in assembly is defined in the emulator instead.
    body = _DEVICE_FUNCTION.sub(lambda match: "" if "asm volatile" in match[0] else match[0], body)
    places = {parameter.name: index for index, parameter in enumerate(function.params)}
    calls = []
    for match, (grid, threads) in zip(kernels, shapes, strict=True):
        parameters = [p.replace("__restrict__", "").split() for p in match[3].split(",")]
        values = [f"({kind})values[{places[name.removesuffix('_ptr')]}]" for kind, name in parameters]
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


def run_program(mod: tvm.IRModule, inputs: Sequence[np.ndarray], folder: Path) -> list[np.ndarray]:
    """Run ``main`` of a lowered program, kernel by kernel."""
    main = mod["main"]
    values: dict = dict(zip(main.params, inputs, strict=True))

    def value_of(expr):
        if isinstance(expr, relax.Tuple):
            return [value_of(field) for field in expr.fields]
        if isinstance(expr, relax.TupleGetItem):
            return value_of(expr.tuple_value)[expr.index]
        return expr.value.numpy() if isinstance(expr, GenericConst) else values[expr]

    for block in main.body.blocks:
        for binding in block.bindings:
            call = binding.value
            if not isinstance(call, relax.Call):
                values[binding.var] = value_of(call)
                continue
            assert call.op.name == "relax.call_tir", call.op
            types = call.ty_args[0]
            types = list(types.fields) if isinstance(types, relax.TupleType) else [types]
            results = [np.empty([int(n) for n in ty.shape], str(ty.dtype)) for ty in types]
            arrays = [np.ascontiguousarray(value_of(argument)) for argument in call.args[1].fields]
            run_kernel(mod[call.args[0]], [*arrays, *results], folder)
            values[binding.var] = results if len(results) > 1 else results[0]
    found = value_of(main.body.body)
    return found if isinstance(found, list) else [found]
