"""Checks of a shared library before it is loaded: a cut-off one would end the process, not raise."""

from __future__ import annotations

import os
import platform
import struct
from pathlib import Path
from typing import IO

from tvm_qfp8.errors import ModelError, TargetError

# e_machine of the ELF header -> what platform.machine() calls it.
_MACHINES = {3: "i686", 40: "armv7l", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_LOAD = 1


def check_shared_object(path: str | os.PathLike) -> None:
    """Refuse an ELF file that this process cannot load; other formats pass.

    Raises
    ------
    ModelError
        The file is missing, cut off, not a library at all, or made for another machine.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_HEADER.size)
            size = os.fstat(file.fileno()).st_size
            if data[:4] != b"\x7fELF":
                if Path(path).suffix == ".so" and platform.system() == "Linux":
                    raise ModelError(
                        f"{path} is no shared library; expected a module written by tvm-qfp8 compile"
                    )
                return
            if len(data) < _HEADER.size:
                raise ModelError(_cut(path, size, _HEADER.size))
            _check_machine(path, data)
            if data[4] == 2:  # 64 bits
                needed = _needed_bytes(file, data)
                if size < needed:
                    raise ModelError(_cut(path, size, needed))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error


def _check_machine(path: str | os.PathLike, data: bytes) -> None:
    number = struct.unpack_from("<H", data, 18)[0]
    machine = _MACHINES.get(number, f"ELF machine {number}")
    here = platform.machine()
    if here in _MACHINES.values() and machine != here:
        raise ModelError(
            f"{path} is made for {machine}, this machine is {here}; compile it with --target native"
        )


def _needed_bytes(file: IO[bytes], data: bytes) -> int:
    """Where the last loaded segment and the section headers end."""
    _, _, _, _, _, segments_at, sections_at, _, _, segment_size, segments, section_size, sections, _ = (
        _HEADER.unpack(data)
    )
    needed = max(segments_at + segments * segment_size, sections_at + sections * section_size)
    file.seek(segments_at)
    table = file.read(segments * segment_size)
    for at in range(0, len(table) - _SEGMENT.size + 1, max(segment_size, 1)):
        kind, _, offset, _, _, file_size, _, _ = _SEGMENT.unpack_from(table, at)
        if kind == _LOAD:
            needed = max(needed, offset + file_size)
    return needed


def _cut(path: str | os.PathLike, size: int, needed: int) -> str:
    return f"{path} is cut off: {size} bytes of {needed}; copy it again"


def machine_of(path: str | os.PathLike) -> str:
    """What a shared library is made for, as ``platform.machine()`` calls it.

    Raises
    ------
    ModelError
        The file is no ELF library.
    """
    with open(path, "rb") as file:
        data = file.read(20)
    if data[:4] != b"\x7fELF":
        raise ModelError(f"{path} is no shared library; expected a module written by tvm-qfp8 compile")
    number = struct.unpack_from("<H", data, 18)[0]
    return _MACHINES.get(number, f"ELF machine {number}")


def needed_libraries(path: str | os.PathLike) -> list[str]:
    """The libraries that the loader will look for."""
    from elftools.elf.dynamic import DynamicSection
    from elftools.elf.elffile import ELFFile

    with open(path, "rb") as file:
        sections = [s for s in ELFFile(file).iter_sections() if isinstance(s, DynamicSection)]
        tags = [tag for section in sections for tag in section.iter_tags("DT_NEEDED")]
        return [str(tag.needed) for tag in tags]  # type: ignore[attr-defined]


SYSTEM_LIBRARIES = (
    "libc.",
    "libm.",
    "libgcc_s.",
    "libstdc++.",
    "libpthread.",
    "libdl.",
    "ld-linux",
    "libtvm",
)
"""What every Linux system or a bundle has."""


def check_library_for(path: Path, architecture: str) -> None:
    """Refuse a freshly linked library for another machine, or one that needs what boards do not have.

    ``architecture`` is the first part of LLVM's triple.

    Raises
    ------
    TargetError
    """
    wanted = {"armv7a": "armv7l", "i386": "i686"}.get(architecture, architecture)
    found = machine_of(path)
    if wanted in _MACHINES.values() and found != wanted:
        raise TargetError(f"the linker wrote a library for {found}, not for {wanted}; name another with --cc")
    strange = [name for name in needed_libraries(path) if not name.startswith(SYSTEM_LIBRARIES)]
    if strange:
        raise TargetError(f"the linked library needs {', '.join(strange)}, which the target may not have")
