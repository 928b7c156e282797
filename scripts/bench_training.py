"""Times forward and backward of interpolated activation layers against torch's own, one thread.

Contestants take turns on the same tensors in one process; every figure is the median over the turns, and every ratio
the median of the turns' ratios. A call is ``y = f(x); y.backward(grad); x.grad = None``: what a training step does.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["TVM_NUM_THREADS"] = "1"

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_functions import take_turns
from torch.nn import functional as exact

from tvm_qfp8.torch import functional as ours
from zoo.bars import Bar
from zoo.machine import describe_machine

REPOSITORY = Path(__file__).resolve().parent.parent
SIZES = (1 << 14, 1 << 20)
COLUMNS = 1024
LAYERS: dict[str, Callable[[Any], Callable]] = {
    "gelu": lambda f: f.gelu,
    "gelu_tanh": lambda f: lambda x: f.gelu(x, approximate="tanh"),
    "silu": lambda f: f.silu,
    "tanh": lambda f: torch.tanh if f is exact else f.tanh,
    "mish": lambda f: f.mish,
    "sigmoid": lambda f: torch.sigmoid if f is exact else f.sigmoid,
    "softplus": lambda f: f.softplus,
    "elu": lambda f: f.elu,
    "selu": lambda f: f.selu,
    "hardswish": lambda f: f.hardswish,
    "softmax": lambda f: lambda x: f.softmax(x, -1),
}
"""By name: the function in ``torch.nn.functional`` or in this package's namespace."""
ASKED = ("gelu", "silu", "tanh", "mish")
LIMIT = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--functions", default=",".join(LAYERS))
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "results" / "bench_training.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in arguments.functions.split(","):
        for size in SIZES:
            for dtype in (torch.float32, torch.bfloat16):
                print(f"{name}, {size} values, {dtype}", file=sys.stderr)
                found = measure(name, size, dtype, arguments.turns)
                rows.append({"function": name, "size": size, "dtype": str(dtype).partition(".")[2], **found})
    checked = [bar._asdict() for row in rows for bar in bars(row)]
    record = {"machine": describe_machine(), "torch": torch.__version__, "turns": arguments.turns}
    record |= {"max_error": ours.MAX_ERROR, "rows": rows, "bars": checked}
    print_tables(record)
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {arguments.output}")


def measure(name: str, size: int, dtype: torch.dtype, turns: int) -> dict[str, Any]:
    """Microseconds of both, of the forward pass alone too, and how many times as fast ours is."""
    generator = torch.Generator().manual_seed(0)
    x = (3.0 * torch.randn(size // COLUMNS, COLUMNS, generator=generator)).to(dtype).requires_grad_()
    grad = torch.randn(x.shape, generator=generator).to(dtype)

    def training(function: Callable) -> Callable[[], None]:
        def call() -> None:
            function(x).backward(grad)
            x.grad = None

        return call

    def inference(function: Callable) -> Callable[[], None]:
        def call() -> None:
            with torch.inference_mode():
                function(x)

        return call

    contestants = {
        f"{who} {what}": make(LAYERS[name](namespace))
        for what, make in (("training", training), ("inference", inference))
        for who, namespace in (("torch", exact), ("ours", ours))
    }
    seconds = take_turns(contestants, turns)

    def ratio(what: str) -> float:
        pairs = zip(seconds[f"torch {what}"], seconds[f"ours {what}"], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    return {
        "microseconds": {who: round(1e6 * statistics.median(t), 1) for who, t in seconds.items()},
        "speedup": {what: ratio(what) for what in ("training", "inference")},
    }


def bars(row: dict[str, Any]) -> list[Bar]:
    """What was asked of forward and backward at the larger size."""
    if row["function"] not in ASKED or row["size"] != SIZES[-1] or row["dtype"] != "float32":
        return []
    measured = row["speedup"]["training"]
    what = f"{row['function']}, {row['size']}: times torch, forward and backward"
    return [Bar(what, measured, f">= {LIMIT}", measured >= LIMIT)]


def print_tables(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=140)
    names = list(record["rows"][0]["microseconds"])
    table = Table(
        "function", "size", "dtype", *names, "training", "inference", title="us a call; times torch"
    )
    for row in record["rows"]:
        times = (f"{row['microseconds'][name]:.0f}" for name in names)
        ratios = (f"{row['speedup'][what]:.2f}" for what in ("training", "inference"))
        table.add_row(row["function"], str(row["size"]), row["dtype"], *times, *ratios)
    console.print(table)
    table = Table("bar", "measured", "limit", "kept")
    for bar in record["bars"]:
        table.add_row(bar["what"], f"{bar['measured']:.2f}", bar["limit"], "yes" if bar["kept"] else "NO")
    console.print(table)


if __name__ == "__main__":
    main()
