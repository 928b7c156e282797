"""How the product with the hidden state of a recurrent layer is quantized, from samples of its inputs.

What float32 steps multiply decides layout and scale, and where the mean of the quantized product differs from that of
the float32 product: the states that the float32 layer has at every step, of the first samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tvm_qfp8.calibration.activations import Observer
from tvm_qfp8.calibration.choose_activation import ActivationChooser, Grade
from tvm_qfp8.calibration.linear import quantized_weight
from tvm_qfp8.calibration.plan import LinearQuantization
from tvm_qfp8.calibration.recurrent_layer import Recurrent
from tvm_qfp8.calibration.rows import KeptRows

BATCH, BATCH_ELEMENTS = 32, 1 << 24
"""Samples that go through the loop at once, at most so many values of their gates."""

Flow = Callable[[int], Mapping[str, Any]]
"""The values that a layer reads, by variable name, of one sample."""


def calibrate_recurrent(
    layer: Recurrent,
    exact: Flow,
    rounded: Flow,
    samples: int,
    chooser: ActivationChooser,
    max_error: float,
    write: Callable[[str, int, tuple], None],
    grade: Grade,
) -> LinearQuantization:
    """Layouts of a grade, scales and bias correction.

    ``write(flow, sample, result)`` receives both flows' results.
    """
    observer = Observer()
    operands: list[tuple[slice, np.ndarray]] = []
    signal = error = 0.0
    count = max(1, min(BATCH, BATCH_ELEMENTS // layer.sums))
    batches = [range(start, min(samples, start + count)) for start in range(0, samples, count)]
    for batch in batches:
        _, seen = layer.observed([exact(sample) for sample in batch])
        observer.record(np.stack([x for _, x in seen]))
        operands = operands or seen
    choice = chooser.choose(observer, [], KeptRows(samples), grade)
    weight = quantized_weight(layer, grade.weights)
    chosen = LinearQuantization(weight, choice.activation, note=choice.note, received=choice.distribution)
    chosen = replace(chosen, bias_correction=_correction(layer.weight, chosen, operands))
    for batch in batches:
        results, _ = layer.observed([exact(sample) for sample in batch])
        found = layer.quantized_outputs([rounded(sample) for sample in batch], chosen, max_error)
        for sample, result, other in zip(batch, results, found, strict=True):
            signal += float(np.square(result[0], dtype=np.float64).sum())
            error += float(np.square(other[0] - result[0], dtype=np.float64).sum())
            write("float32", sample, result)
            write("quantized", sample, other)
    sqnr = float(10 * np.log10(signal / error)) if error > 0 else float("inf")
    return replace(chosen, sqnr_db=sqnr)


def _correction(
    weight: np.ndarray, chosen: LinearQuantization, operands: list[tuple[slice, np.ndarray]]
) -> np.ndarray:
    """Mean of (quantized - float32) product, ``(gates * hidden,)``: the product of the operands' means."""
    found = np.zeros(len(weight), np.float32)
    rounded_weight = chosen.weight.dequantize()
    for rows in {(rows.start, rows.stop) for rows, _ in operands}:
        part = slice(*rows)
        x = np.concatenate([x for own, x in operands if own == part])
        received = x if chosen.activation is None else chosen.activation.rounded(x)
        found[part] = rounded_weight[part] @ received.mean(0) - weight[part] @ x.mean(0)
    return found
