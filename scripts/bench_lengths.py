"""Times one module compiled for several lengths against onnxruntime and OpenVINO on inputs of many lengths.

MiniLM, texts of 8 to 128 tokens without padding. Ours is one module for lengths up to 128, which pads a text up to
the next of them; onnxruntime runs the file with its open dimensions; OpenVINO gets a network of its own, reshaped, for
each length. Contestants take turns, each in a process of its own (``zoo/contest.py``).
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
LENGTHS = (8, 10, 16, 24, 32, 36, 40, 48, 64, 70, 80, 96, 100, 128)
"""10, 36, 70 and 100 lie between those of the module."""
PEERS = ("onnxruntime float32", "onnxruntime int8 dynamic", "openvino float32")
"""Their static int8 files have one length."""


class AtLength:
    """The model as the peers' runners ask it, with inputs of one length."""

    def __init__(self, model: Any, length: int) -> None:
        self._model, self._length = model, length

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """All inputs are ``(1, tokens)``."""
        return dict.fromkeys(self._model.input_shapes(), (1, self._length))


def main() -> None:
    from zoo.contest import contest_parser

    parser = contest_parser(__doc__, 10, REPOSITORY / "results" / "bench_lengths.json")
    arguments = parser.parse_args()
    if arguments.serve:
        serve_runner(arguments.serve, arguments.module)
        return
    import tvm_qfp8
    from zoo.contest import contest
    from zoo.machine import describe_machine

    module, report = compile_minilm()
    record: dict[str, Any] = {
        "machine": describe_machine(),
        "turns": arguments.turns,
        "compiled for": tvm_qfp8.lengths_up_to(LENGTHS[-1]),
        "module bytes": module.stat().st_size,
        "totals": report.totals,
        "rows": [],
    }
    for length in LENGTHS:
        print(f"{length} tokens", file=sys.stderr)
        commands = {
            runner: [__file__, "--serve", f"{runner}:{length}", "--module", str(module)]
            for runner in ("qfp8", *PEERS)
        }
        medians = contest(commands, 1, arguments.turns)
        record["rows"].append(
            {
                "tokens": length,
                "milliseconds": {runner: round(value, 3) for runner, value in medians.items()},
                "speedup": {r: round(v / medians["qfp8"], 3) for r, v in medians.items() if r != "qfp8"},
            }
        )
    print_table(record)
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {arguments.output}")


def compile_minilm() -> tuple[Path, Any]:
    """The module for all lengths, calibrated with 32 samples; (saved module, report)."""
    import tvm_qfp8
    from zoo import minilm
    from zoo.fetch import cache_dir

    compiled = tvm_qfp8.compile(
        str(minilm.onnx_path()),
        "native",
        input_shapes=dict.fromkeys(minilm.input_shapes(), (1, tvm_qfp8.lengths_up_to(LENGTHS[-1]))),
        calibration=minilm.calibration(32),
        config=tvm_qfp8.Config(check_finite=False),
    )
    output = cache_dir("bench") / "minilm_lengths.so"
    compiled.export_library(output)
    return output, compiled.report


def serve_runner(which: str, module: Path) -> None:
    """Be one contestant."""
    import tvm_qfp8
    from zoo import latency, minilm
    from zoo.contest import serve

    runner, text = which.split(":")
    length = int(text)
    ids = np.random.default_rng(0).integers(1000, 20000, (1, length))
    values = (ids, np.ones_like(ids), np.zeros_like(ids))
    sample = dict(zip(minilm.input_shapes(), values, strict=True))

    def prepare() -> Callable[[], Any]:
        if runner == "qfp8":
            return functools.partial(tvm_qfp8.load(module).run, sample)
        return functools.partial(latency.PEERS[runner](AtLength(minilm, length), 1), sample)

    serve(prepare)


def print_table(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("tokens", "ours, ms", *PEERS, title="MiniLM, one thread: times as long as ours")
    for row in record["rows"]:
        others = (f"{row['speedup'][peer]:.2f}" for peer in PEERS)
        table.add_row(str(row["tokens"]), f"{row['milliseconds']['qfp8']:.2f}", *others)
    Console().print(table)


if __name__ == "__main__":
    main()
