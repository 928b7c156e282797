"""TVM's runtime libraries for any architecture, from the official wheels."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

from tvm_qfp8.errors import TargetError

LIBRARIES = ("libtvm_ffi.so", "libtvm_runtime.so")
PACKAGES = ("apache-tvm", "apache-tvm-ffi")
WITH_WHEELS = ("x86_64", "aarch64")
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")


def runtime_libraries(machine: str) -> list[Path]:
    """Paths of ``LIBRARIES`` for ``machine`` (as ``platform.machine()``); empty where no wheels exist.

    For this machine they are those of the installed packages; for another one they are downloaded once, to
    ``~/.cache/tvm_qfp8``.

    Raises
    ------
    TargetError
        The download failed, or the wheels do not hold the libraries.
    """
    if machine == platform.machine():
        import tvm
        import tvm_ffi

        folders = [Path(module.__file__).parent / "lib" for module in (tvm, tvm_ffi)]
        return [next(f / name for f in folders if (f / name).exists()) for name in LIBRARIES]
    if machine not in WITH_WHEELS:
        return []
    requirements = [f"{package}=={version(package)}" for package in PACKAGES]
    key = hashlib.sha256(" ".join([machine, *requirements]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tvm_qfp8"
    folder = cache / f"runtime-{machine}-{key}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as part:
            _extract(_download(requirements, machine, Path(part)), Path(part) / "lib")
            try:
                os.rename(Path(part) / "lib", folder)
            except OSError:  # another process was faster
                if not folder.is_dir():
                    raise
    return [folder / name for name in LIBRARIES]


def _download(requirements: list[str], machine: str, folder: Path) -> list[Path]:
    platforms = [f"--platform={name}_{machine}" for name in _PLATFORMS]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    finished = subprocess.run(
        [*command, *platforms, f"--dest={folder}", *requirements], capture_output=True, text=True, check=False
    )
    if finished.returncode != 0:
        reason = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise TargetError(f"pip cannot download TVM's runtime for {machine}: {reason}")
    return sorted(folder.glob("*.whl"))


def _extract(wheels: list[Path], folder: Path) -> None:
    folder.mkdir()
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if Path(name).name in LIBRARIES:
                    (folder / Path(name).name).write_bytes(archive.read(name))
    missing = [name for name in LIBRARIES if not (folder / name).exists()]
    if missing:
        raise TargetError(
            f"the wheels {', '.join(w.name for w in wheels)} hold no {' and no '.join(missing)}"
        )
