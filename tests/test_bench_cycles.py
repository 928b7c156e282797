"""The bench of Arm kernels: the peer's tile, and one kernel traced and judged."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

import bench_cycles

from cycles.float_tile import MACS_PER_STEP, ORDERS, float_tile

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.mark.parametrize("order", ORDERS)
def test_the_float_tile_does_every_product_once(order):
    products = [line for line in float_tile(6, order).splitlines() if line.startswith("fmla")]
    assert 4 * len(products) == 6 * MACS_PER_STEP
    assert len(set(products[: MACS_PER_STEP // 4])) == MACS_PER_STEP // 4


def test_an_old_llvm_is_not_asked(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name if name.endswith("-16") else None)
    with pytest.raises(SystemExit, match="LLVM 17 or newer is missing"):
        bench_cycles.llvm_tool("llvm-mca")


@pytest.mark.aarch64
def test_a_kernel_is_traced_and_judged(tmp_path, aarch64_root):
    try:
        bench_cycles.llvm_tool("llvm-mca")
    except SystemExit as error:
        pytest.skip(str(error))
    command = [sys.executable, SCRIPTS / "bench_cycles.py", "--cpus", "neoverse-n1", "--shape", "14x32x24"]
    subprocess.run([*command, "--output", tmp_path / "cycles.json"], check=True, timeout=300)
    tiles = json.loads((tmp_path / "cycles.json").read_text())["tiles"]
    products = {(tile["activation"], tile["weight"]): tile["most_frequent"]["sdot"] for tile in tiles}
    # Three byte products for each of grid values, two where the activation is a byte; sixteen an instruction.
    least = {("UE2M6", "E2M5"): 3, ("E1M6", "E2M5"): 2, ("E1M6", "E1M6"): 1}
    assert all(products[layouts] >= count * 14 * 32 * 24 / 16 for layouts, count in least.items())
    assert all(0 < tile["ratio"] < 4 for tile in tiles)
