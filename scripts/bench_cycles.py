"""Multiply-adds a cycle of dense tiles on Arm CPUs, codes in and codes out, against float32's ``fmla``, by llvm-mca.

    python scripts/bench_cycles.py [--shape 96x512x96] [--cpus cortex-a53,neoverse-n1] [--output FILE]

The kernel that ``compile`` would write runs under qemu, which says what instructions it executes, decoding, loads and
encoding included; llvm-mca says how many cycles they take when all data is in the first-level cache. Needs
qemu-aarch64-static, aarch64-linux-gnu-g++ and LLVM 17 or newer (Debian: ``llvm-19``).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cycles.float_tile import MACS_PER_STEP, ORDERS, float_tile
from cycles.trace import executed, mnemonics
from kernel_bench.cases import Dense
from kernel_bench.ours import executable
from zoo.machine import describe_machine

REPOSITORY = Path(__file__).resolve().parents[1]

CPUS = ("cortex-a53", "cortex-a55", "cortex-a72", "neoverse-n1", "neoverse-v1")
"""neoverse-n1 stands for the Cortex-A76, neoverse-v1 for i8mm."""

LAYOUTS = (("UE2M6", "E2M5"), ("E3M4", "E2M5"), ("E1M6", "E2M5"), ("UE1M7", "E1M6"), ("E1M6", "E1M6"))
"""Of activations and weights."""

OLDEST_LLVM = 17
"""Older models of newer cores reuse the Cortex-A57's."""


def main() -> None:
    """Judge each CPU and layout, print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="96x512x96", help="rows x depth x columns")
    parser.add_argument("--cpus", default=",".join(CPUS))
    parser.add_argument("--output", type=Path, default=Path("results/bench_cycles.json"))
    options = parser.parse_args()
    rows, depth, columns = (int(extent) for extent in options.shape.split("x"))
    case = Dense(rows, depth, columns)
    mca = llvm_tool("llvm-mca")
    command = [REPOSITORY / "scripts" / "aarch64_root"]
    runner = (
        Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()) / "runner"
    )
    table = Table(title=f"multiply-adds a cycle, {case.name}")
    for heading in ("CPU", "activations", "weights", "qfp8", "float32", "qfp8 / float32"):
        table.add_column(heading)
    records = []
    for cpu in options.cpus.split(","):
        orders = {order: cycles(mca, cpu, float_tile(depth, order)) for order in ORDERS}
        order = min(orders, key=lambda name: orders[name])
        peer = MACS_PER_STEP * depth / orders[order]
        for activation, weight in LAYOUTS:
            text = trace(case, cpu, activation, weight, runner)
            ours = case.macs / cycles(mca, cpu, "\n".join(text))
            records.append(
                {
                    "cpu": cpu,
                    "activation": activation,
                    "weight": weight,
                    "macs_per_cycle": round(ours, 2),
                    "float32_macs_per_cycle": round(peer, 2),
                    "float32_order": order,
                    "ratio": round(ours / peer, 2),
                    "instructions": len(text),
                    "most_frequent": mnemonics(text),
                }
            )
            table.add_row(cpu, activation, weight, f"{ours:.2f}", f"{peer:.2f}", f"{ours / peer:.2f}")
    Console().print(table)
    version = subprocess.run([mca, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"LLVM version (\S+)", version)
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "llvm_mca": found[1] if found else "",
        "shape": case.name,
        "tiles": records,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.output}")


def llvm_tool(name: str) -> Path:
    """The newest of LLVM's tools with this name that is on the machine."""
    versions = range(40, OLDEST_LLVM - 1, -1)
    for candidate in [f"{name}-{version}" for version in versions]:
        if found := shutil.which(candidate):
            return Path(found)
    raise SystemExit(
        f"{name} of LLVM {OLDEST_LLVM} or newer is missing; on Debian and Ubuntu: apt install llvm-19"
    )


def trace(case: Dense, cpu: str, activation: str, weight: str, runner: Path) -> list[str]:
    """What the compiled case executes on random codes."""
    mod = executable(case, f"llvm -mtriple=aarch64-linux-gnu -mcpu={cpu}", activation, weights=weight)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "case.so"
        mod.export_library(str(library), cc="aarch64-linux-gnu-g++")
        codes = np.random.default_rng(0).integers(0, 127, (case.rows, case.depth), dtype=np.uint8)
        return executed(library, codes, runner, llvm_tool("llvm-objdump"))


def cycles(mca: Path, cpu: str, assembly: str) -> int:
    """Cycles of a run of instructions by the CPU's model."""
    command = [mca, "-mtriple=aarch64", f"-mcpu={cpu}", "-mattr=+dotprod,+i8mm,+fullfp16", "-iterations=1"]
    quiet = ["-instruction-info=0", "-resource-pressure=0"]
    finished = subprocess.run([*command, *quiet], input=assembly, capture_output=True, text=True)
    found = re.search(r"Total Cycles:\s+(\d+)", finished.stdout)
    if found is None:
        raise SystemExit(f"llvm-mca cannot read the kernel for {cpu}: {finished.stderr[:300]}")
    return int(found[1])


if __name__ == "__main__":
    main()
