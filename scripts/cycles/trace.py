"""The instructions that one call of a compiled module executes, as assembly text, found by running it under qemu."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np

QEMU = ("setarch", "-R", "qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu")
"""Without address randomization, so that the library lies at the same place in both runs."""

CONTROL = ("b", "bl", "br", "blr", "ret", "cbz", "cbnz", "tbz", "tbnz", "adr", "adrp")


def executed(library: Path, x: np.ndarray, runner: Path, objdump: Path) -> list[str]:
    """Assembly of every instruction of the kernels (functions ``*_compute_``) that ``main(x)`` executes, in order.

    Jumps are replaced by ``nop``: they have been followed, and their targets are not part of the text.
    """
    folder = library.parent
    x.tofile(folder / "x.bin")
    extents = " ".join(str(extent) for extent in x.shape)
    (folder / "manifest.txt").write_text(f"in {x.dtype} {x.ndim} {extents} x.bin\n")
    call = [str(runner), "vm", str(library), "main", str(folder)]
    base = _load_address(library, call)
    log = folder / "trace.txt"
    options = ["-singlestep", "-d", "exec,nochain", "-dfilter", f"{base:#x}+{library.stat().st_size:#x}"]
    subprocess.run([*QEMU, *options, "-D", str(log), *call], check=True, capture_output=True)
    code = _disassembly(library, objdump)
    text = []
    with log.open() as lines:
        for line in lines:
            found = code.get(int(line.split("/")[1], 16) - base)
            if found:
                text.append(found)
    return text


def mnemonics(text: list[str], most: int = 8) -> dict[str, int]:
    """How often the most frequent instructions are executed."""
    return dict(Counter(line.split()[0] for line in text).most_common(most))


def _load_address(library: Path, call: list[str]) -> int:
    finished = subprocess.run([*QEMU, "-strace", *call], capture_output=True, text=True)
    opened = re.escape(str(library)) + r'",O_RDONLY\|O_CLOEXEC\) = (\d+)\n.*?MAP_FIXED,\1,0\) = (0x[0-9a-f]+)'
    found = re.search(opened, finished.stderr, re.DOTALL)
    if finished.returncode or found is None:
        raise RuntimeError(f"qemu did not load {library}: {finished.stderr[-300:]}")
    return int(found[2], 16)


def _disassembly(library: Path, objdump: Path) -> dict[int, str]:
    command = [str(objdump), "-d", "--mattr=+all", "--no-show-raw-insn", str(library)]
    code, kernel = {}, False
    for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
        if symbol := re.match(r"[0-9a-f]+ <(.*)>:", line):
            kernel = symbol[1].endswith("_compute_")
        elif kernel and (instruction := re.match(r"\s*([0-9a-f]+):\s+(.*)", line)):
            text = re.split(r"\s*(?:<|//)", instruction[2])[0]
            mnemonic = text.split()[0]
            jumps = mnemonic in CONTROL or mnemonic.startswith("b.")
            code[int(instruction[1], 16)] = "nop" if jumps else text
    return code
