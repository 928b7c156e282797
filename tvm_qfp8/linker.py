"""The linker of modules: this machine's compiler, or one that links for another machine.

For another machine, and where this one has no compiler, ``zig cc`` from the ``ziglang`` wheel is taken, which brings
the C library of every target and needs no system package; else GNU's cross compiler if it is on PATH.
"""

from __future__ import annotations

import importlib.util
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tvm.support import cc
from tvm.target import Target, codegen

from tvm_qfp8.errors import TargetError
from tvm_qfp8.shared_object import check_library_for
from tvm_qfp8.targets import host_of

ZIG_TRIPLES = {
    # The C library of manylinux_2_28, which TVM's own runtime needs.
    "aarch64": "aarch64-linux-gnu.2.28",
    "x86_64": "x86_64-linux-gnu.2.28",
    "armv7a": "arm-linux-gnueabihf",
    "riscv64": "riscv64-linux-gnu",
}
"""Architecture of LLVM's triple -> zig's target."""


def architecture(target: Target) -> str:
    """The first part of the triple of the target or, for a GPU, its host: ``aarch64``, ``x86_64``, ``armv7a`` ..."""
    triple = host_of(target).attrs.get("mtriple") or codegen.llvm_get_system_triple()
    return str(triple).partition("-")[0]


def linker(target: Target, command: str | None = None) -> Callable | None:
    """What ``export_library`` takes as ``fcompile``; None leaves the choice to TVM, on systems other than Linux.

    Parameters
    ----------
    target : tvm.target.Target
        A CPU, or a GPU with its host.
    command : str
        A C++ compiler that links for the target, with options if it needs any.

    Raises
    ------
    TargetError
        No linker for the target is installed. While linking: it failed, or wrote a file for another machine.
    """
    machine = architecture(target)
    if command is not None:
        words = shlex.split(command)
        if not words or shutil.which(words[0]) is None:
            raise TargetError(
                f"no linker {command!r} on PATH; --cc takes a C++ compiler that links for {machine}"
            )
        return _link_by(words, machine)
    here = machine == str(codegen.llvm_get_system_triple()).partition("-")[0]
    if here and platform.system() != "Linux":
        return None
    own = cc.get_cc()
    if here and own is not None:
        return _link_by(shlex.split(own), machine)
    if importlib.util.find_spec("ziglang") is not None and machine in ZIG_TRIPLES:
        # Modules are C; zig would first build a C++ library, which takes a minute.
        return _link_by(zig_compiler(machine, "cc"), machine)
    gnu = "g++" if here else str(host_of(target).attrs["mtriple"]).replace("armv7a-", "arm-") + "-g++"
    if shutil.which(gnu) is None:
        raise TargetError(
            f"no linker for {machine}: pip install 'tvm-qfp8[board]' brings one, or install {gnu} "
            f"(Debian and Ubuntu: apt install g++-{gnu.removesuffix('-g++')}), or name another with --cc"
        )
    return _link_by([gnu], machine)


def zig_compiler(machine: str, language: str = "c++") -> list[str]:
    """The command line of ``zig cc`` or ``zig c++`` for an architecture of ``ZIG_TRIPLES``."""
    return [sys.executable, "-m", "ziglang", language, "-target", ZIG_TRIPLES[machine]]


def run_compiler(command: Sequence[str]) -> None:
    """Run a compiler; its command line and messages are shown when it fails.

    Raises
    ------
    TargetError
    """
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        message = (finished.stderr or finished.stdout).strip() or f"exit status {finished.returncode}"
        raise TargetError(f"linking failed: {' '.join(command)}\n{message}")


def _link_by(compiler: list[str], machine: str) -> Callable:
    def link(output: str, objects: Sequence[str] | str, options: Sequence[str] | None = None, **_) -> None:
        files = [objects] if isinstance(objects, str) else list(objects)
        # TVM writes debug information, but kernels have no lines of source.
        flags = ["-shared", "-fPIC", "-O2", "-Wl,--strip-debug"]
        run_compiler([*compiler, *flags, "-o", output, *files, *(options or [])])
        check_library_for(Path(output), machine)

    # export_library asks for the format of the object files.
    link.object_format = "o"  # type: ignore[attr-defined]
    return link
