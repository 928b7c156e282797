"""Times 3x3 convolutions by Winograd's algorithm against the direct form, for each instruction set this CPU runs.

On both sides of the line that ``topi/winograd_plan.py`` draws (``winograd_is_faster``), which this measurement backs.
Also what the filters of one layer take at the first call, in time and memory. Writes results/bench_winograd.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

REPOSITORY = Path(__file__).resolve().parent.parent
SHAPES = (
    # size, channels, out channels
    *((56, 64, 64), (28, 128, 128), (14, 256, 256), (7, 512, 512)),
    *(
        (56, 3, 16),
        (56, 4, 16),
        (56, 6, 32),
        (56, 8, 8),
        (24, 8, 32),
        (56, 16, 16),
        (56, 16, 32),
        (28, 32, 32),
    ),
    *((3, 64, 64), (13, 32, 256), (13, 256, 32)),
)
TARGETS = ("native", "x86-64-v3", "x86-64")


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench winograd", description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "results" / "bench_winograd.json")
    arguments = parser.parse_args()
    os.environ.update({"TVM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"})
    from bench_models import NOISY, reference_work

    from zoo.machine import describe_machine

    record: dict[str, Any] = {"machine": describe_machine(), "turns": arguments.turns, "cases": []}
    before = reference_work()
    for target in TARGETS:
        for shape in SHAPES:
            row = measure(target, *shape, arguments.turns)
            record["cases"].append(row)
            print(f"{target:10} {row['case']:16} x{row['winograd_is_faster_by']:.2f}", file=sys.stderr)
    after = reference_work()
    record["noisy"] = max(before, after) / min(before, after) > NOISY
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {arguments.output}")


def measure(target: str, size: int, channels: int, out_channels: int, turns: int) -> dict[str, Any]:
    """Microseconds of both forms; Winograd's wherever it is possible."""
    from kernel_bench import ours
    from kernel_bench.cases import Convolution
    from kernel_bench.clock import medians
    from tvm_qfp8.relay_passes import linear_kernels
    from tvm_qfp8.topi.winograd_plan import winograd_is_faster

    case = Convolution(size, channels, out_channels, kernel=3, layers=1)
    plans = []

    def always(plan) -> bool:
        plans.append(plan)
        return True

    with mock.patch.object(linear_kernels, "winograd_is_faster", always):
        winograd = ours.runner(case, target=target)
    direct = ours.runner(case, winograd=False, target=target)
    started = time.process_time()
    winograd()
    first = time.process_time() - started
    found = medians({"direct": direct, "winograd": winograd}, turns)
    return {
        "target": target,
        "case": f"{size}x{size}x{channels}-{out_channels}",
        "microseconds": {name: round(value, 2) for name, value in found.items()},
        "winograd_is_faster_by": round(found["direct"] / found["winograd"], 3),
        "chosen": winograd_is_faster(plans[0]),
        "first_call_takes_longer_by_us": round(first * 1e6 - found["winograd"], 1),
    }


if __name__ == "__main__":
    main()
