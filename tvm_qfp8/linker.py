"""The linker for modules of another machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from tvm.support import cc
from tvm.target import Target, codegen

from tvm_qfp8.errors import TargetError


def linker(target: Target, command: str | None = None) -> Callable | None:
    """What ``export_library`` takes as ``fcompile``; None links with this machine's own compiler.

    Parameters
    ----------
    target : tvm.target.Target
        A CPU.
    command : str
        A C++ compiler that links for the target; by default GNU's, named after the target's triple.

    Raises
    ------
    TargetError
        The compiler is not installed.
    """
    here = str(codegen.llvm_get_system_triple())
    triple = str(target.attrs["mtriple"]) if "mtriple" in target.attrs else here
    if command is None:
        if triple.partition("-")[0] == here.partition("-")[0]:
            return None
        command = triple.replace("armv7a-", "arm-") + "-g++"
    if shutil.which(command) is None:
        raise TargetError(
            f"no linker for {triple}: {command} is not on PATH; install it "
            f"(Debian and Ubuntu: apt install {_package(command)}) or name another with --cc"
        )
    return cc.cross_compiler(command)


def _package(command: str) -> str:
    prefix = command.removesuffix("-g++")
    return f"g++-{prefix.replace('x86_64', 'x86-64')}" if prefix != command else command
