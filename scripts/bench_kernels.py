"""Times single layers against onnxruntime, one thread, 8-bit codes in and out for us and for int8.

Contestants take turns in one process; a figure is the median, less what a call that does next to nothing takes.
The int8 peer is the faster of its operators; our schedules come from the tuning logs where those have one. Dense
layers and convolutions are timed in the layouts that calibration picks first and in linear ones, whose bytes are
multiplied as int8's are. Writes results/bench_kernels.json with the bars and whether they are met; a run on a busy
machine says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
FLOAT, INT8 = "onnxruntime float32", "onnxruntime int8"
DEFAULT = "qfp8 without tuning log"
LINEAR = "qfp8 linear layouts"
MAC_PER_INSTRUCTION = {
    "avx512+vnni": {"qfp8": 32, "int8": 64, "float32": 16},
    "avx512": {"qfp8": 32, "int8": 32, "float32": 16},
    "avx2": {"qfp8": 16, "int8": 16, "float32": 8},
}
"""Multiply-adds of one vector instruction: ``vpdpwssd`` or ``vpmaddwd`` for us, ``vpdpbusd`` or two steps for int8."""


def main() -> None:
    arguments = parse_arguments()
    # Before NumPy, TVM and onnxruntime start their threads.
    os.environ.update({"TVM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    from bench_models import NOISY, reference_work

    from kernel_bench import ours, peers
    from kernel_bench.cases import FAMILIES
    from kernel_bench.clock import medians
    from zoo.machine import describe_machine

    machine = describe_machine()
    before = reference_work()
    overhead = medians({"qfp8": ours.empty_runner(), "onnxruntime": peers.empty_runner()}, arguments.turns)
    rows = []
    for family in arguments.families.split(","):
        for case in FAMILIES[family]:
            if arguments.only in case.name:
                rows.append({"family": family, **measure(case, family, overhead, arguments.turns)})
                print(line(rows[-1]), file=sys.stderr)
    after = reference_work()
    record = {
        "machine": machine,
        "multiply_adds_per_instruction": MAC_PER_INSTRUCTION.get(machine["instruction_set"]),
        "turns": arguments.turns,
        "noisy": max(before, after) / min(before, after) > NOISY,
        "call_overhead_us": {name: round(value, 2) for name, value in overhead.items()},
        "cases": rows,
        "bars": bars(rows),
    }
    for bar in record["bars"]:
        print(f"{'met   ' if bar['met'] else 'MISSED'} {bar['name']}: {bar['value']} (asked: {bar['asked']})")
    if record["noisy"]:
        print("the machine was busy: take these figures as a hint only")
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {arguments.output}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--families", default="gemm,conv3x3,gemv,depthwise")
    parser.add_argument("--only", default="", help="shapes whose name holds this, such as 4096")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "results" / "bench_kernels.json")
    return parser.parse_args()


def measure(case, family: str, overhead: dict[str, float], turns: int) -> dict[str, Any]:
    """Microseconds and ratios of one case, for one of its layers."""
    from kernel_bench import ours, peers
    from kernel_bench.clock import medians, reading_runner

    choose = ours.tuned_schedules()
    runners = {"qfp8": ours.runner(case, choose), **peers.runners(case)}
    if family != "depthwise":
        runners[LINEAR] = ours.runner(case, choose, layouts=ours.LINEAR_LAYOUTS)
    if choose.used:
        runners[DEFAULT] = ours.runner(case)
    size = case.macs * case.layers
    if family == "gemv":
        runners["plain read"] = reading_runner(size)
    found = {}
    for name, value in medians(runners, turns).items():
        spent = (
            0.0 if name == "plain read" else overhead["qfp8" if name.startswith("qfp8") else "onnxruntime"]
        )
        found[name] = (value - spent) / case.layers
    int8 = min(value for name, value in found.items() if name.startswith(INT8))
    row: dict[str, Any] = {
        "case": case.name,
        "microseconds": {name: round(value, 2) for name, value in found.items()},
        "gmac_per_second": round(case.macs / found["qfp8"] / 1e3, 1),
        "speedup": {
            "float32": round(found[FLOAT] / found["qfp8"], 3),
            "int8": round(int8 / found["qfp8"], 3),
        },
    }
    if LINEAR in found:
        row["speedup_linear"] = {
            "float32": round(found[FLOAT] / found[LINEAR], 3),
            "int8": round(int8 / found[LINEAR], 3),
        }
    if choose.used:
        row["default_schedule_share"] = round(found["qfp8"] / found[DEFAULT], 3)
    if family == "gemv":
        read = found["plain read"]
        row["gigabytes_per_second"] = {
            "qfp8": round(case.macs / found["qfp8"] / 1e3, 2),
            "plain read": round(case.macs / read / 1e3, 2),
        }
        row["share_of_bandwidth"] = round(read / found["qfp8"], 3)
    return row


def line(row: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {value:.1f}" for name, value in row["microseconds"].items())
    ratios = f"x{row['speedup']['float32']:.2f} float32, x{row['speedup']['int8']:.2f} int8"
    return f"{row['family']:9} {row['case']:28} {ratios}; us: {times}"


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is asked of each family, and what was found; families that were not timed have none."""
    found: list[dict[str, Any]] = []

    def bar(name: str, values: list[float], asked: float) -> None:
        if values:
            value = round(statistics.geometric_mean(values), 3)
            found.append({"name": name, "value": value, "asked": f">= {asked}", "met": value >= asked})

    def of(family: str, peer: str, case: str = "", key: str = "speedup") -> list[float]:
        chosen = [r for r in rows if r["family"] == family and case in ("", r["case"])]
        if peer == "share_of_bandwidth":
            return [row[peer] for row in chosen]
        return [row[key][peer] for row in chosen if key in row]

    def of_linear(family: str, peer: str, case: str = "") -> list[float]:
        return of(family, peer, case, "speedup_linear")

    bar("GEMM and 1x1, geometric mean, float32", of("gemm", "float32"), 1.9)
    bar("GEMM and 1x1, geometric mean, int8", of("gemm", "int8"), 1.0)
    bar("GEMM and 1x1 in linear layouts, geometric mean, int8", of_linear("gemm", "int8"), 1.0)
    bar("GEMM and 1x1, slowest shape, float32", sorted(of("gemm", "float32"))[:1], 1.3)
    bar("3x3 stride 1, geometric mean, float32", of("conv3x3", "float32"), 2.4)
    bar("3x3 stride 1, geometric mean, int8", of("conv3x3", "int8"), 1.25)
    bar("3x3 stride 1 in linear layouts, geometric mean, int8", of_linear("conv3x3", "int8"), 1.25)
    large, rotation, small = "1x4096x4096", "1x4096x4096, 8 in rotation", "1x1024x1024"
    bar("GEMV 4096, float32", of("gemv", "float32", large), 3.5)
    bar("GEMV 4096, int8", of("gemv", "int8", large), 1.0)
    bar("GEMV 4096, share of a plain read's bandwidth", of("gemv", "share_of_bandwidth", large), 0.85)
    bar("GEMV 4096 in rotation, share of DRAM's", of("gemv", "share_of_bandwidth", rotation), 0.85)
    bar("GEMV 1024, float32", of("gemv", "float32", small), 2.2)
    bar("GEMV 1024, int8", of("gemv", "int8", small), 1.0)
    bar("GEMV 1024 in linear layouts, int8", of_linear("gemv", "int8", small), 1.0)
    bar("depthwise 3x3, geometric mean, float32", of("depthwise", "float32"), 1.5)
    shares = sorted(row["default_schedule_share"] for row in rows if "default_schedule_share" in row)
    bar("default schedules, share of tuned speed, least", shares[:1], 0.8)
    return found


if __name__ == "__main__":
    main()
