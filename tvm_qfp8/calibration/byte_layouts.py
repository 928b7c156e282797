"""Which tensors get linear layouts: those where they cost the outputs little for the multiply-adds they save.

Linear grid values are bytes, of which an instruction multiplies twice as many as of int16 values with VNNI (x86), and
three times as many with Arm's dot products. Linear layouts have fewer fine steps, though, and how much that costs
differs from tensor to tensor by a factor of a thousand. So the error of each activation and the weights that it meets,
in their best layouts and in linear ones, is compared at the module's outputs, all else in float32; tensors are taken in
the order of error for each multiply-add, up to a budget, and none where that makes up little of the network. The choice
does not look at the target: a module gives the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tvm_qfp8.calibration.activations import LAYOUTS, LINEAR_LAYOUTS, Choice, Observer
from tvm_qfp8.calibration.evaluate import Program
from tvm_qfp8.calibration.fake_quantize import fake_quantize
from tvm_qfp8.calibration.linear import LINEAR_WEIGHTS, WEIGHTS, Linear, LinearSteps, quantized_weight
from tvm_qfp8.calibration.propagate import energy, outputs_with
from tvm_qfp8.quantize import QTensor

MOST_LOST_DB = 0.1
"""Of the outputs' signal to error, estimated by the sum of all tensors' errors with weights rounded to nearest.

Rounded on data, weights err less, so what is lost in the end is about twice as much.
"""

LEAST_SHARE = 0.25
"""Of the multiply-adds of all layers that might be served: less is not worth any error."""


def tensors_in_bytes(
    program: Program,
    found: LinearSteps,
    samples: Sequence[Mapping[str, np.ndarray]],
    method: str = "mse",
    token_mask: str = "attention_mask",
    progress: Callable[[str, int, int], None] | None = None,
) -> set[str]:
    """Names of the variables that get linear layouts, with the weights of the dense layers that read them.

    Parameters
    ----------
    program : Program
        In canonical form.
    found : LinearSteps
        What is quantized in it.
    samples : sequence of {input name: array}
        A few are enough.
    method, token_mask
        As in ``calibrate``.
    """
    report = progress or (lambda stage, done, total: None)
    readers = _readers(found)
    weights = {n: [_weights(linears, w) for w in (WEIGHTS, LINEAR_WEIGHTS)] for n, linears in readers.items()}
    lost: dict[str, list[float]] = {name: [0.0, 0.0] for name in readers}
    for index, sample in enumerate(samples):
        values: dict[str, Any] = dict(sample)
        mask = sample.get(token_mask)
        with np.errstate(all="ignore"):
            for step in program.steps:
                values[step.name] = step.run(values)
            exact = program.outputs(values)
            for done, (name, linears) in enumerate(readers.items(), 1):
                for place, choice in enumerate(_choices(values[name], mask, method)):
                    outputs = _rounded(program, linears, values, choice, weights[name][place])
                    change = [a - b for a, b in zip(outputs, exact, strict=True)] if outputs else None
                    lost[name][place] += np.inf if change is None else energy(change, mask)
                report("choose layouts", index * len(readers) + done, len(samples) * len(readers))
    return _within_budget(readers, lost) if samples else set()


def _readers(found: LinearSteps) -> dict[str, list[Linear]]:
    """By tensor, the layers that read it, where one of them is dense and no product of activations is."""
    readers: dict[str, list[Linear]] = {}
    for linear in found.linear.values():
        readers.setdefault(linear.source, []).append(linear)
    products = {source for product in found.products.values() for source in product.sources}
    return {name: linears for name, linears in readers.items() if name not in products and _saved(linears)}


def _saved(linears: Sequence[Linear]) -> int:
    """Multiply-adds of bytes instead of int16 values."""
    return sum(linear.macs for linear in linears if not linear.is_depthwise)


def _choices(value: np.ndarray, mask: np.ndarray | None, method: str) -> tuple[Choice, Choice]:
    """The best layout and the best linear one for one sample's tensor."""
    observer = Observer()
    is_rows = mask is not None and mask.any() and value.ndim and mask.size * value.shape[-1] == value.size
    observer.record(value, mask.reshape(-1) != 0 if mask is not None and is_rows else None)
    return observer.choose(LAYOUTS, method), observer.choose(LINEAR_LAYOUTS, method)


def _weights(linears: Sequence[Linear], layout: str) -> dict[str, QTensor]:
    return {
        linear.step.name: quantized_weight(linear, layout) for linear in linears if not linear.is_depthwise
    }


def _rounded(
    program: Program,
    linears: Sequence[Linear],
    values: Mapping[str, Any],
    choice: Choice,
    weights: Mapping[str, QTensor],
) -> list[np.ndarray] | None:
    """The outputs with the tensor of these layers and ``weights`` rounded; None where there is no layout for it."""
    if choice.layout is None or choice.scale is None:
        return None
    rounded = fake_quantize(values[linears[0].source], choice.layout, choice.scale)
    by_name = {linear.step.name: linear for linear in linears}

    def change(step, _seen):
        linear, weight = by_name[step.name], weights.get(step.name)
        return linear.output(rounded, linear.weight if weight is None else weight.dequantize())

    return outputs_with(program, dict.fromkeys(by_name, change), values)


def _within_budget(readers: Mapping[str, list[Linear]], lost: Mapping[str, list[float]]) -> set[str]:
    budget = sum(best for best, _ in lost.values() if np.isfinite(best)) * (10 ** (MOST_LOST_DB / 10) - 1)
    cost = {name: linear - best for name, (best, linear) in lost.items() if np.isfinite([best, linear]).all()}
    saved = {name: _saved(linears) for name, linears in readers.items()}
    chosen = set()
    for name in sorted(cost, key=lambda name: cost[name] / saved[name]):
        if cost[name] <= budget:
            budget -= max(cost[name], 0.0)
            chosen.add(name)
    enough = sum(saved[name] for name in chosen) >= LEAST_SHARE * sum(saved.values())
    return chosen if enough else set()
