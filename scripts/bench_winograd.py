"""Times 3x3 convolutions by Winograd's algorithm against the direct form, for each instruction set this CPU runs.

On both sides of the lines that ``topi/winograd_plan.py`` draws, which this measurement backs; with the layouts that
calibration picks most often, and with linear ones, whose direct form multiplies bytes where the CPU has instructions
for it. Also what the filters of one layer take at the first call. Writes results/bench_winograd.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from kernel_bench.cases import Convolution

REPOSITORY = Path(__file__).resolve().parent.parent
NEIGHBOURS = (
    *((56, 64, 64), (28, 128, 128), (14, 256, 256), (7, 512, 512)),
    *(
        (56, 3, 16),
        (56, 6, 32),
        (56, 8, 8),
        (24, 8, 32),
        (56, 16, 16),
        (56, 16, 64),
        (56, 64, 16),
        (28, 32, 32),
    ),
    *((3, 64, 64), (4, 64, 64), (5, 128, 128), (8, 256, 256), (13, 32, 256), (13, 256, 32)),
)
"""Size, channels, out channels."""
DILATED = ((28, 256, 256, 2), (28, 512, 512, 4), (40, 512, 64, 12), (20, 16, 16, 2), (20, 16, 16, 8))
"""And dilation."""
CASES = tuple(
    Convolution(size, channels, wide, kernel=3, layers=1, dilation=dilation)
    for size, channels, wide, dilation in (*((*shape, 1) for shape in NEIGHBOURS), *DILATED)
)
TARGETS = ("native", "x86-64-v3", "x86-64")


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench winograd", description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "results" / "bench_winograd.json")
    arguments = parser.parse_args()
    os.environ.update({"TVM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"})
    from bench_models import NOISY, reference_work

    from kernel_bench import ours
    from zoo.machine import describe_machine

    record: dict[str, Any] = {"machine": describe_machine(), "turns": arguments.turns, "cases": []}
    before = reference_work()
    for target in TARGETS:
        for case in CASES:
            for layouts in (ours.LAYOUTS, ours.LINEAR_LAYOUTS):
                row = measure(target, case, layouts[Convolution], arguments.turns)
                record["cases"].append(row)
                print(
                    f"{target:10} {row['case']:28} {row['microseconds']} takes {row['chosen']}",
                    file=sys.stderr,
                )
    after = reference_work()
    record["noisy"] = max(before, after) / min(before, after) > NOISY
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {arguments.output}")


def measure(target: str, case: Convolution, layouts: tuple[str, str], turns: int) -> dict[str, Any]:
    """Microseconds of each form that is possible, and the one that ``compile`` takes."""
    from kernel_bench import ours
    from kernel_bench.clock import medians
    from tvm_qfp8.relay_passes import conv_kernels
    from tvm_qfp8.topi.winograd_plan import plan_tiling, plan_winograd
    from tvm_qfp8.topi.winograd_tiling import F2, F4

    chosen = []

    def asked(*arguments):
        chosen.append(plan_winograd(*arguments))
        return chosen[-1]

    def runner(plan: Callable) -> ours.Run:
        with mock.patch.object(conv_kernels, "plan_winograd", plan):
            return ours.runner(case, target=target, layouts={Convolution: layouts})

    runner(asked)
    runs = {"direct": runner(lambda *arguments: None)}
    for tiling in (F2, F4):
        if case.size // case.dilation >= tiling.outputs:
            runs[repr(tiling)] = runner(
                lambda shape, codes, *rates, tiling=tiling: plan_tiling(tiling, shape, codes)
            )
    first = {}
    for name, run in runs.items():
        started = time.process_time()
        run()
        first[name] = time.process_time() - started
    found = medians(runs, turns)
    activation, weight = layouts
    return {
        "target": target,
        "case": f"{case.name} {activation} {weight}",
        "microseconds": {name: round(value, 2) for name, value in found.items()},
        "chosen": repr(chosen[0].tiling) if chosen[0] else "direct",
        "first_call_takes_longer_by_us": {
            name: round(first[name] * 1e6 - found[name], 1) for name in found if name != "direct"
        },
    }


if __name__ == "__main__":
    main()
