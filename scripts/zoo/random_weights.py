"""Networks of well-known shapes with random weights, for timing alone."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from zoo import fetch, mobilenetv2

SEED = 0
STATISTICS = 8
"""Photos from which BatchNorm layers get their statistics, so that activations are of plausible size."""

calibration = mobilenetv2.calibration
input_shapes = mobilenetv2.input_shapes


def onnx_file(name: str, build: Callable[[], Any]) -> Path:
    """Path of a network as torch exports it: input ``input``, a photo, output ``logits``; made when missing."""
    path = fetch.cache_dir("files", "random") / f"{name}.onnx"
    if path.exists():
        return path
    import torch  # takes seconds, and who only times the file does not need it

    torch.manual_seed(SEED)
    network = build()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean over all samples
    photos = torch.from_numpy(np.concatenate([inputs["input"] for inputs in calibration(STATISTICS)]))
    with torch.no_grad():
        network.train()(photos)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter of TorchScript needs no further package
        torch.onnx.export(
            network.eval(),
            (photos[:1],),
            file,
            input_names=["input"],
            output_names=["logits"],
            dynamo=False,
        )
    fetch.write_atomically(path, file.getvalue())
    return path
