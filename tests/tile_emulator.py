"""Runs kernels for tile registers (AMX) on CPUs that have none: each tile instruction becomes a call of C code."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.cpu_features import cpuinfo_flags
from tvm_qfp8.topi.amx import tiles

SOURCE = Path(__file__).parent / "tile_emulator.c"
NOTHING_TO_ASK = "define linkonce_odr hidden i32 @qfp8_ask_for_tiles() { ret i32 0 }"


@functools.cache
def load_emulator() -> ctypes.CDLL:
    """The compiled C code, where the modules of this process find its functions."""
    library = Path(tempfile.mkdtemp()) / "tile_emulator.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", SOURCE, "-o", library], check=True)
    return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def emulate_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels written from now on call the emulator; skips the test where that cannot be."""
    if "avx512vbmi" not in cpuinfo_flags():
        pytest.skip("kernels for tile registers (AMX) also need AVX512-VBMI, which this CPU lacks")
    if shutil.which("cc") is None:
        pytest.skip("the emulator of tile registers (AMX) needs a C compiler")
    load_emulator()

    def emit(name: str, *arguments) -> None:
        values = [tirx.const(a, "int32") if isinstance(a, int) else a for a in arguments]
        T.evaluate(tirx.call_extern("int32", f"tile_{name}", *values))

    monkeypatch.setattr(tiles, "_emit", emit)
    monkeypatch.setattr(tiles, "_ASK", NOTHING_TO_ASK)
