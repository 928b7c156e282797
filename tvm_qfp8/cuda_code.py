"""Compiled code for GPUs: nvcc's output in place of CUDA C in exported modules.

TVM's wheel writes CUDA C. Where it finds a GPU's driver it has that compiled by a callback; elsewhere the module it
makes holds the source, to be compiled on the machine that loads it. Exported modules shall not need a compiler there,
so their device code is compiled here and put into the packed module in the source's place (TVM's cuda_module.cc: a
module is saved as format, functions and code, each with its length).
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm.target import Target

from tvm_qfp8.errors import TargetError

FORMATS = ("ptx", "cubin", "fatbin")
# Each float operation rounds by itself, as on CPUs; division and square root are exact without fast math.
_OPTIONS = ("-O3", "-std=c++17", "--fmad=false", "-diag-suppress=186,177")


def find_nvcc() -> str | None:
    """Path of NVIDIA's compiler; None where there is none."""
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.exists() else None)


def compile_cuda(source: str, arch: str, code_format: str = "fatbin") -> bytes:
    """Device code for ``arch`` such as ``"sm_80"``.

    Parameters
    ----------
    code_format : str
        ``"ptx"``, assembly for this and newer GPUs; ``"cubin"``, machine code for this generation; ``"fatbin"``, both.

    Raises
    ------
    TargetError
        nvcc is missing, or refuses the source; its message is shown.
    """
    compiler = find_nvcc()
    if compiler is None:
        raise TargetError(
            f"no nvcc on PATH; it compiles kernels for {arch}: install NVIDIA's CUDA toolkit, 12.4 or newer"
        )
    number = arch.removeprefix("sm_")
    code = f"[compute_{number},sm_{number}]" if code_format == "fatbin" else f"sm_{number}"
    generate = ["-gencode", f"arch=compute_{number},code={code}"]
    if code_format == "ptx":
        generate = [f"-arch=compute_{number}"]
    with tempfile.TemporaryDirectory() as folder:
        input_path, output = Path(folder) / "kernels.cu", Path(folder) / f"kernels.{code_format}"
        input_path.write_text(source)
        command = [compiler, f"--{code_format}", *_OPTIONS, *generate, "-o", str(output), str(input_path)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode != 0:
            raise TargetError(f"compiling kernels failed: {' '.join(command)}\n{finished.stderr.strip()}")
        return output.read_bytes()


def register_compiler(target: Target) -> None:
    """Let TVM compile modules that are to run in this process as exported ones are compiled."""

    def compile_source(source: str) -> bytes:
        return compile_cuda(source, str(target.attrs["arch"]))

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", compile_source, override=True)


def packer(target: Target) -> Callable:
    """What ``export_library`` takes as ``fpack_imports``: writes the imported modules with compiled device code."""

    def pack(module: Any, is_system_lib: bool, _prefix: str, folder: str) -> str:
        assert not is_system_lib
        blob = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")(module).numpy().tobytes()
        symbol = tvm_ffi.get_global_func("runtime.ModuleImportsBlobName")()
        data = Path(folder) / "imports.bin"
        data.write_bytes(with_compiled_code(blob, str(target.attrs["arch"])))
        assembly = Path(folder) / "imports.s"
        assembly.write_text(_ASSEMBLY.format(symbol=symbol, path=data))
        return str(assembly)

    return pack


_ASSEMBLY = """    .section .rodata,"a"
    .globl {symbol}
    .balign 16
{symbol}:
    .incbin "{path}"
    .section .note.GNU-stack,"",%progbits
"""


def _bytes(data: bytes) -> bytes:
    """As TVM writes a string: its length, then itself."""
    return struct.pack("<Q", len(data)) + data


def with_compiled_code(blob: bytes, arch: str) -> bytes:
    """Packed modules whose CUDA sources are replaced by device code.

    ``blob`` is its own length, the tree of imports, and kind and bytes of each module. A module that holds compiled
    code already stays as it is.
    """
    (size,) = struct.unpack_from("<Q", blob)
    modules = blob[8 : 8 + size]
    # Kind and, as first part of the module's bytes, format are both "cuda" where it holds a source.
    kind = _bytes(b"cuda")
    at = modules.find(kind)
    while at >= 0:
        start = at + len(kind) + 8
        if modules[start : start + len(kind)] == kind:
            (length,) = struct.unpack_from("<Q", modules, at + len(kind))
            functions, source = _split_source(modules[start + len(kind) : start + length])
            code = compile_cuda(source, arch)
            whole = _bytes(b"fatbin") + functions + _bytes(code)
            modules = modules[: at + len(kind)] + _bytes(whole) + modules[start + length :]
            start += len(whole)
        at = modules.find(kind, start)
    return _bytes(modules)


def _split_source(rest: bytes) -> tuple[bytes, str]:
    """Functions and source of a module's bytes: the source is last, and its length stands before it."""
    at = rest.rindex(b'extern "C" __global__')
    for start in range(at, 7, -1):
        if struct.unpack_from("<Q", rest, start - 8)[0] == len(rest) - start:
            return rest[: start - 8], rest[start:].decode()
    raise TargetError("TVM saved a CUDA module in an unknown way; this package fits apache-tvm 0.27.0.post1")


def cuda_source(executable: Any) -> str:
    """The CUDA C of a compiled program."""
    found: list[str] = []

    def visit(module: tvm.runtime.Module) -> None:
        for imported in module.imports:
            if imported.kind == "cuda":
                found.append(imported.inspect_source())
            visit(imported)

    visit(getattr(executable, "mod", executable))
    return "\n".join(found)
