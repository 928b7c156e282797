"""How the product with the hidden state of a recurrent layer is quantized, from samples of its inputs.

What float32 steps multiply decides layout and scale, and where the mean of the quantized product differs from that of
the float32 product: the layer's own states at every step, not those that an error made there changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tvm_qfp8.calibration.activations import Observer
from tvm_qfp8.calibration.choose_activation import ActivationChooser
from tvm_qfp8.calibration.linear import quantized_weight
from tvm_qfp8.calibration.plan import LinearQuantization
from tvm_qfp8.calibration.recurrent_layer import Recurrent

CORRECTION_SAMPLES = 32
"""Samples whose states are kept to correct biases."""

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
) -> LinearQuantization:
    """Layouts, scales and bias correction; ``write(flow, sample, result)`` receives both flows' results."""
    observer, operands = Observer(), []
    signal = error = 0.0
    for sample in range(samples):
        _, seen = layer.observed(exact(sample))
        observer.record(np.stack([x for _, x in seen]))
        if sample < CORRECTION_SAMPLES:
            operands += seen
    choice = chooser.choose(observer, [], lambda: iter(()), False)
    chosen = LinearQuantization(
        quantized_weight(layer), choice.activation, note=choice.note, received=choice.distribution
    )
    chosen = replace(chosen, bias_correction=_correction(layer.weight, chosen, operands))
    for sample in range(samples):
        result = layer.observed(exact(sample))[0]
        found = layer.quantized_output(rounded(sample), chosen, max_error)
        signal += float(np.square(result[0], dtype=np.float64).sum())
        error += float(np.square(found[0] - result[0], dtype=np.float64).sum())
        write("float32", sample, result)
        write("quantized", sample, found)
    sqnr = float(10 * np.log10(signal / error)) if error > 0 else float("inf")
    return replace(chosen, sqnr_db=sqnr)


def _correction(
    weight: np.ndarray, chosen: LinearQuantization, operands: Sequence[tuple[slice, np.ndarray]]
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
