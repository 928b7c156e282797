"""Fixtures of several tests: instruction sets, and compiled modules for 64-bit Arm that run under qemu."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantized_programs import TARGETS, TILES, machine_runs

REPOSITORY = Path(__file__).resolve().parent.parent
CROSS_COMPILER = "aarch64-linux-gnu-g++"


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End the process here, all being reported.

    With torch, onnxruntime and TVM in one process, their libraries now and then crash while the interpreter unloads
    them, after the last test, and the crash would replace pytest's exit status.
    """
    status = getattr(config, "final_exit_status", None)
    if status is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(status))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Keep the exit status for ``pytest_unconfigure``."""
    session.config.final_exit_status = exitstatus  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def aarch64_root() -> Path:
    """Folder with TVM's runtime for 64-bit Arm and the runner; the test is skipped where it cannot be made."""
    if shutil.which("bash") is None:
        pytest.skip("scripts/aarch64_root needs bash")
    environment = os.environ | {"PYTHON": sys.executable}
    made = subprocess.run(
        [REPOSITORY / "scripts" / "aarch64_root"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        reason = (made.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"64-bit Arm cannot be emulated here: {reason}")
    return Path(made.stdout.strip())


@pytest.fixture
def run_aarch64(aarch64_root: Path, tmp_path: Path) -> Callable[..., list[np.ndarray]]:
    """``run(module, inputs, function="main", outputs=None) -> list of arrays``, computed under qemu.

    ``module`` is what ``tvm.compile`` returns for an aarch64 target, or the path of an exported library.
    ``outputs``, a list of ``(shape, dtype)``, makes the call one of a PrimFunc ``function(in..., out...)``;
    without it ``function`` belongs to a Relax virtual machine and returns a tensor or a tuple.
    """

    def run(
        module: Any,
        inputs: Sequence[np.ndarray],
        function: str = "main",
        outputs: Sequence[tuple[tuple[int, ...], str]] | None = None,
    ) -> list[np.ndarray]:
        library = module
        if not isinstance(module, str | os.PathLike):
            from tvm.support import cc

            library = tmp_path / "module.so"
            module.export_library(str(library), fcompile=cc.cross_compiler(CROSS_COMPILER))
        lines = []
        for index, array in enumerate(inputs):
            array = np.ascontiguousarray(array)
            array.tofile(tmp_path / f"in{index}.bin")
            lines.append(_manifest_line("in", array.dtype, array.shape, f"in{index}.bin"))
        for index, (shape, dtype) in enumerate(outputs or []):
            lines.append(_manifest_line("out", np.dtype(dtype), shape, f"out{index}.bin"))
        (tmp_path / "manifest.txt").write_text("".join(lines))
        mode = "vm" if outputs is None else "prim"
        command = ["qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu", aarch64_root / "runner"]
        finished = subprocess.run(
            [*command, mode, str(library), function, str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
        )
        if finished.returncode != 0:
            raise RuntimeError(f"{function} failed under qemu: {finished.stderr.strip()}")
        return [_read(tmp_path, line) for line in finished.stdout.splitlines() if line.startswith("out ")]

    return run


def _manifest_line(kind: str, dtype: np.dtype, shape: Sequence[int], file: str) -> str:
    return f"{kind} {dtype} {len(shape)} {' '.join(map(str, shape))} {file}\n"


def _read(folder: Path, line: str) -> np.ndarray:
    _, dtype, _, *shape, file = line.split()
    return np.fromfile(folder / file, dtype).reshape([int(extent) for extent in shape])


@pytest.fixture(params=[*TARGETS.values(), TILES], ids=[*TARGETS, "amx"])
def target(request):
    """Every instruction set that this machine runs."""
    if not machine_runs(request.param):
        pytest.skip(f"this CPU does not run {request.param}")
    return request.param
