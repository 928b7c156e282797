"""The kernel benchmark: its arithmetic, and one run on shapes too small to tell anything."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

import bench_kernels

from kernel_bench import peers
from kernel_bench.cases import FAMILIES, Convolution, Dense

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def row(family: str, case: str, float32: float, int8: float, share: float = 1.0) -> dict:
    return {
        "family": family,
        "case": case,
        "speedup": {"float32": float32, "int8": int8},
        "share_of_bandwidth": share,
    }


def test_bars_are_geometric_means_and_the_slowest_shape():
    found = bench_kernels.bars([row("gemm", "a", 1.0, 0.5), row("gemm", "b", 4.0, 2.0)])
    values = {bar["name"]: (bar["value"], bar["met"]) for bar in found}
    assert values == {
        "GEMM and 1x1, geometric mean, float32": (2.0, True),
        "GEMM and 1x1, geometric mean, int8": (1.0, True),
        "GEMM and 1x1, slowest shape, float32": (1.0, False),
    }


def test_bars_of_gemv_go_by_shape():
    rows = [row("gemv", case.name, 1 + i, 1 + i, 0.5) for i, case in enumerate(FAMILIES["gemv"])]
    found = {bar["name"]: bar["value"] for bar in bench_kernels.bars(rows)}
    assert found["GEMV 4096, float32"] == 1
    assert found["GEMV 1024, int8"] == 3
    assert found["GEMV 4096 in rotation, share of DRAM's"] == 0.5


def test_multiply_adds_of_a_case():
    assert Dense(2, 3, 5, layers=8).macs == 30
    assert Convolution(8, 4, 6, 3, layers=2).macs == 8 * 8 * 9 * 4 * 6
    assert Convolution(7, 4, 4, 3, layers=1, stride=2, depthwise=True).macs == 4 * 4 * 9 * 4


@pytest.mark.parametrize(
    "case",
    [
        Dense(2, 16, 16, layers=2),
        Convolution(6, 4, 8, 1, layers=2),
        Convolution(6, 16, 16, 3, 1, 2, depthwise=True),
    ],
)
def test_every_kind_of_case_is_measured(case):
    overhead = {"qfp8": 0.0, "onnxruntime": 0.0}
    found = bench_kernels.measure(case, "gemm", overhead, turns=1)
    assert set(found["microseconds"]) == {
        "qfp8",
        "qfp8 linear layouts",
        *peers.runners(case),
    }
    assert found["speedup"]["float32"] > 0 and found["speedup"]["int8"] > 0


def test_the_script_writes_what_it_found(tmp_path):
    output = tmp_path / "kernels.json"
    command = [sys.executable, SCRIPTS / "bench_kernels.py", "--families", "gemv", "--only", "1024"]
    done = subprocess.run(
        [*command, "--turns", "1", "--output", output], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert [case["case"] for case in record["cases"]] == ["1x1024x1024"]
    is_tuned = "default_schedule_share" in record["cases"][0]  # where the log has this CPU and shape
    assert [bar["name"] for bar in record["bars"]] == [
        "GEMV 1024, float32",
        "GEMV 1024, int8",
        "GEMV 1024 in linear layouts, int8",
        *(["default schedules, share of tuned speed, least"] if is_tuned else []),
    ]
    assert record["machine"]["instruction_set"]


def test_the_dispatcher_parses():
    assert os.access(SCRIPTS / "bench", os.X_OK)
    assert subprocess.run(["bash", "-n", SCRIPTS / "bench"], check=False).returncode == 0
