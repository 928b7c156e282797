"""Times recurrent layers against onnxruntime in float32 and with dynamic int8, one thread.

Contestants take turns in one process; as in the other benchmarks (``zoo/contest.py``) a turn is one call that does not
count and some timed ones. Times are medians, ratios the median of the turns' ratios. Weights are random, calibration
samples and inputs normal; SQNR is that of the outputs against float32.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["TVM_NUM_THREADS"] = "1"

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

REPOSITORY = Path(__file__).resolve().parent.parent
GATES = {"GRU": 3, "LSTM": 4}
SAMPLES = 8


@dataclass(frozen=True)
class Network:
    """Recurrent layers one after the other."""

    kind: str
    steps: int
    inputs: int
    hidden: int
    layers: int = 1
    bidirectional: bool = False
    batch: int = 1

    def __str__(self) -> str:
        both = ", both directions" if self.bidirectional else ""
        return f"{self.kind} {self.layers} x {self.hidden}, {self.steps} steps, batch {self.batch}{both}"

    def model(self) -> onnx.ModelProto:
        """With random weights, as large as torch makes them."""
        from onnx import TensorProto, helper

        from zoo.onnx_graph import Graph

        rng, graph = np.random.default_rng(0), Graph({})
        directions, width = 1 + self.bidirectional, GATES[self.kind] * self.hidden
        x, size, limit = "x", self.inputs, self.hidden**-0.5
        attributes: dict[str, Any] = {"hidden_size": self.hidden}
        attributes |= {"direction": "bidirectional"} if self.bidirectional else {}
        attributes |= {"linear_before_reset": 1} if self.kind == "GRU" else {}
        for layer in range(self.layers):
            shapes = {"w": (width, size), "r": (width, self.hidden), "b": (2 * width,)}
            weights = [
                graph.constant(
                    f"{name}{layer}", rng.uniform(-limit, limit, (directions, *shape)).astype(np.float32)
                )
                for name, shape in shapes.items()
            ]
            outputs = graph.op("Transpose", graph.op(self.kind, x, *weights, **attributes), perm=[0, 2, 1, 3])
            x, size = graph.op("Reshape", outputs, graph.integers(0, 0, -1)), directions * self.hidden
        value = helper.make_tensor_value_info
        made = helper.make_graph(
            graph.nodes,
            "recurrent",
            [value("x", TensorProto.FLOAT, (self.steps, self.batch, self.inputs))],
            [value(x, TensorProto.FLOAT, (self.steps, self.batch, size))],
            list(graph.constants.values()),
        )
        return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    def sample(self, seed: int) -> dict[str, np.ndarray]:
        """An input."""
        shape = self.steps, self.batch, self.inputs
        return {"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}


NETWORKS = (
    Network("LSTM", 50, 256, 256),
    Network("GRU", 50, 256, 256),
    Network("LSTM", 300, 80, 256, layers=2, bidirectional=True),
    Network("LSTM", 50, 256, 256, batch=16),
    Network("LSTM", 50, 512, 1024),
)


def main() -> None:
    from zoo.machine import describe_machine

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "results" / "bench_recurrent.json")
    arguments = parser.parse_args()
    rows = []
    for network in NETWORKS:
        rows.append({"network": str(network), **asdict(network), **measure(network, arguments.turns)})
        row = rows[-1]
        ratios = "  ".join(f"{name} x{ratio:.2f}" for name, ratio in row["times as fast as"].items())
        times = f"compiled in {row['compile_seconds']:.1f} s, {row['milliseconds']['QFP8']:.2f} ms"
        print(f"{row['network']:54} {times}, {row['sqnr_db']:.1f} dB   {ratios}")
    record = {"machine": describe_machine(), "turns": arguments.turns, "samples": SAMPLES, "rows": rows}
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {arguments.output}")


def measure(network: Network, turns: int) -> dict[str, Any]:
    """Compile time, times of all contestants, ratios and SQNR of one network."""
    from onnxruntime.quantization import quantize_dynamic

    import tvm_qfp8
    from zoo.contest import contest_on_one_thread
    from zoo.peers import session

    model, given = network.model(), network.sample(SAMPLES)
    began = time.perf_counter()
    module = tvm_qfp8.compile(model, calibration=[network.sample(seed) for seed in range(SAMPLES)])
    compile_seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        plain, dynamic = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        onnx.save(model, plain)
        quantize_dynamic(plain, dynamic)
        runs = {"onnxruntime float32": session(plain), "onnxruntime int8 dynamic": session(dynamic)}
    contestants: dict[str, Callable] = {"QFP8": module.run, **runs}
    found, expected = module.run(given)[0], runs["onnxruntime float32"](given)[0]
    milliseconds, ratios = contest_on_one_thread(contestants, given, turns)
    return {
        "compile_seconds": compile_seconds,
        "sqnr_db": float(10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum())),
        "milliseconds": milliseconds,
        "times as fast as": ratios,
    }


if __name__ == "__main__":
    main()
