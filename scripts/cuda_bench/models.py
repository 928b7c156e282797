"""Whole models on a GPU against a CPU's outputs and torch's time."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cuda_bench.timing import seconds


def whole_models(torch: Any, folder: Path) -> list[dict[str, Any]]:
    """Exported modules: their outputs against a CPU's, and the time of a call, of its device part alone, and of torch.

    torch's is the same architecture in float16 with random weights, captured as a graph, inputs in the GPU's memory.
    """
    import tvm_qfp8

    found = []
    for path in sorted(folder.glob("*.so")):
        module, stored = tvm_qfp8.load(path), np.load(path.with_suffix(".npz"))
        inputs = {name.removeprefix("input "): stored[name] for name in stored if name.startswith("input ")}
        expected = [stored[name] for name in stored if name.startswith("output ")]
        outputs = module.run(inputs)
        times = []
        for _ in range(50):
            start = time.perf_counter()
            module.run(inputs)
            times.append(time.perf_counter() - start)
        row: dict[str, Any] = {
            "model": path.stem,
            "equal": all(np.array_equal(a, b) for a, b in zip(outputs, expected, strict=True)),
            "seconds_with_copies": statistics.median(times),
            "seconds": statistics.median(module.time_evaluator(inputs, repeat=50)),
        }
        peer = MODELS[path.stem](torch) if path.stem in MODELS else None
        if peer is not None:
            with torch.no_grad():
                (taken,) = seconds(torch, {"torch": peer}, 15, 4).values()
            row |= {"torch_seconds": statistics.median(taken)}
            row["times_torch"] = row["torch_seconds"] / row["seconds"]
        found.append(row)
        print(row, file=sys.stderr)
    return found


def float16_mobilenet(torch: Any) -> Callable[[int], object] | None:
    """torchvision's, where it is installed, channels last."""
    try:
        import torchvision
    except ImportError:
        return None
    kind = {"device": "cuda", "dtype": torch.float16, "memory_format": torch.channels_last}
    model = torchvision.models.mobilenet_v2().eval().to(**kind)
    x = torch.randn(1, 3, 224, 224).to(**kind)
    return lambda _: model(x)


def float16_minilm(torch: Any) -> Callable[[int], object]:
    """Embedding and encoder of all-MiniLM-L6-v2's sizes."""
    layer = torch.nn.TransformerEncoderLayer(384, 12, 1536, activation="gelu", batch_first=True)
    parts = torch.nn.Embedding(30522, 384), torch.nn.LayerNorm(384), torch.nn.TransformerEncoder(layer, 6)
    model = torch.nn.Sequential(*parts).eval().to("cuda", torch.float16)
    tokens = torch.randint(0, 30522, (1, 64), device="cuda")
    return lambda _: model(tokens)


MODELS = {"mobilenetv2": float16_mobilenet, "minilm": float16_minilm}
