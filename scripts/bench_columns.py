"""Times softmax over an axis before the last, and functions of codes by table, one thread.

Contestants take turns on the same data in one process; every figure is the median over the turns, every ratio the
median of the turns' ratios. Softmax: against torch and onnxruntime over the same axis. Codes: each form of the
look-up against the plain one, which reads the table in cache byte by byte.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["TVM_NUM_THREADS"] = "1"

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
SHAPES = ((1, 21, 129 * 129), (8, 64, 56 * 56), (1, 1000, 14 * 14), (12, 128, 128), (4, 128, 49))
CODES = (1 << 14, 1 << 20)
TARGETS = ("native", "x86-64-v3")
TURN_SECONDS = 0.004


def main() -> None:
    from zoo.machine import describe_machine

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "results" / "bench_columns.json")
    arguments = parser.parse_args()
    rows = [{"what": f"softmax {shape}, axis 1", **softmax(shape, arguments.turns)} for shape in SHAPES]
    rows += [
        {"what": f"{size} codes, {target}", **codes(size, target, arguments.turns)}
        for size in CODES
        for target in TARGETS
    ]
    for row in rows:
        ratios = "  ".join(f"{name} x{ratio:.2f}" for name, ratio in row["times as fast as"].items())
        print(f"{row['what']:32} {row['gigaelements']['ours']:7.2f} G/s   {ratios}")
    record = {"machine": describe_machine(), "turns": arguments.turns, "rows": rows}
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {arguments.output}")


def softmax(shape: tuple[int, ...], turns: int) -> dict[str, Any]:
    """Softmax over axis 1."""
    import torch
    from tvm import relax

    from zoo.nonlinear import Layer, ours

    x = (3.0 * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
    layer = Layer(
        "softmax",
        lambda emit, v: relax.op.nn.softmax(v, 1),
        lambda v: torch.softmax(v, 1),
        "Softmax",
        columns=shape[1],
        attributes={"axis": 1},
    )
    contestants = {"ours": ours(layer, x, "native", 1e-3)[0]}
    contestants |= {name: make(x) for name, make in layer.peers.items()}
    return in_turns(contestants, x.size, turns)


def codes(size: int, target: str, turns: int) -> dict[str, Any]:
    """A table of 256 codes applied to codes."""
    import tvm

    from tvm_qfp8.code_generation import generate_code
    from tvm_qfp8.targets import cpu_features, isa, parse_target
    from tvm_qfp8.topi.code_lookup import look_up_prim_func
    from tvm_qfp8.topi.isa import instruction_set

    parsed = parse_target(target)
    instructions = instruction_set(isa(parsed), cpu_features(parsed))
    forms = {
        "ours": instructions,
        "16 vpshufb": replace(instructions, byte_permute=False),
        "plain": instruction_set("generic"),
    }
    rng = np.random.default_rng(0)
    source = tvm.runtime.tensor(rng.integers(0, 256, size, dtype=np.uint8))
    table = tvm.runtime.tensor(rng.permutation(256).astype(np.uint8))
    result = tvm.runtime.tensor(np.zeros(size, np.uint8))
    contestants = {}
    for name, form in forms.items():
        function = look_up_prim_func(form, 1, (size,), "uint8").with_attr("global_symbol", "main")
        run = generate_code(tvm.IRModule({"main": function}), parsed).mod["main"]
        contestants[name] = lambda run=run: run(source, table, result)
    return in_turns(contestants, size, turns)


def in_turns(contestants: dict[str, Callable[[], object]], size: int, turns: int) -> dict[str, Any]:
    """Gigaelements a second of each contestant, and how many times as fast as the others ``ours`` is."""
    calls = {name: max(1, round(TURN_SECONDS / seconds(run, 1))) for name, run in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(turns):
        for name, run in contestants.items():
            times[name].append(seconds(run, calls[name]))
    speedup = {
        name: statistics.median(a / b for a, b in zip(taken, times["ours"], strict=True))
        for name, taken in times.items()
        if name != "ours"
    }
    rates = {name: size / statistics.median(taken) / 1e9 for name, taken in times.items()}
    return {"gigaelements": rates, "times as fast as": speedup}


def seconds(run: Callable[[], object], calls: int) -> float:
    """Seconds a call, after one that does not count."""
    run()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


if __name__ == "__main__":
    main()
