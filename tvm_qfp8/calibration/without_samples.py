"""Quantization without calibration samples: weights, and what linear layers read, by scales found at run time.

Most linear layers read codes whose scales are found at run time (``run_time_scales``); onnxruntime and torch call this
dynamic quantization. It is a pass over the activation, which convolutions of few multiply-adds for each value, such as
depthwise ones, would not win back: they stay float32.

Weights that meet codes are linear: tile registers and Arm's dot products multiply bytes by anything faster. Outputs of
transformers lose one to two decibels by it, those of convolutional networks nothing or gain.

What ReLU6 or a sigmoid gives has a limit (``saturation``), hence one scale that is known before: every linear layer
reads codes of it, depthwise convolutions, too. So has the hidden state of LSTM and GRU layers that start from zero.

The network's own values lie in the range that its weights were trained for. Its inputs may have columns of any units,
years beside incomes, of which a common scale keeps the largest: they stay float32 unless a layout is asked for. Only
images of three colours are taken to have one.

Products of two activations (attention) read codes with a scale for each sample, what a softmax gives one for each row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tvm_qfp8.calibration.choose_activation import FLOAT32
from tvm_qfp8.calibration.evaluate import MOVING_STEPS, Name, Program
from tvm_qfp8.calibration.linear import LINEAR_WEIGHTS, Linear, LinearSteps, Product, quantized_weight
from tvm_qfp8.calibration.nonnegative import nonnegative
from tvm_qfp8.calibration.plan import ActivationQuantization, LinearQuantization, QuantizationPlan
from tvm_qfp8.calibration.recurrent_layer import Recurrent
from tvm_qfp8.calibration.run_time_scales import reads_image, with_scales_at_run_time
from tvm_qfp8.calibration.saturation import saturated
from tvm_qfp8.format import get_layout

LIMITED = "UE2M6"
"""Layout of values whose limit is known; many are far below it."""

FACTORS, SHARES = ("E3M4", "E3M4"), ("UE2M6", "E2M5")
"""Layouts of the operands of products of two activations, such as queries and keys, and of products of what a softmax
gives, whose rows have scales of their own, such as with values: keys have outliers in some channels, values seldom."""

STATE = "E1M6"
"""Layout of the hidden state of a recurrent layer: a step errs by 0.2 % of the limit, and bytes multiply twice as fast,
which is most of the layer's time."""

LEAST_MACS, VECTOR = 32, 16
"""For each value that a convolution reads. Fewer outputs than a vector holds take as long as these."""

MATRIX = 2
"""Dimensions."""

LEAST_ROWS, LEAST_WIDTH = 160, 32
"""Of a product of activations, such as tokens and their values in attention: of 128 tokens encoding takes what the
product saves."""

HOLDS_VALUES = MOVING_STEPS | {"relax.astype"}
"""Operators whose results are values of their first argument."""

NO_DATA = "no calibration data"
FEW_MACS = "too few multiply-adds for each value to find scales at run time: float32 without calibration data"
IS_INPUT = (
    "reads an input of the module, which may have columns of any units: float32 without calibration data"
)
NEVER_NEGATIVE = "{} holds no negative values, and without calibration data their absence is not known"


def quantize_without_samples(
    program: Program,
    found: LinearSteps,
    plan: QuantizationPlan,
    activations: str,
    done: Callable[[], None],
) -> None:
    """Put all that ``found`` holds into ``plan``.

    Parameters
    ----------
    program : Program
    found : LinearSteps
        Of the program.
    plan : QuantizationPlan
        Changed in place.
    activations : str
        As in ``Config``.
    done : callable
        Called after each linear operator.
    """
    inputs, above_zero, limits = values_of_inputs(program), nonnegative(program), saturated(program)
    specs = program.inputs | {step.name: step.spec for step in program.steps}
    auto = activations == "auto"
    reasons = {
        name: _reason_for_float32(linear, activations, inputs, above_zero, specs[linear.source].shape)
        for name, linear in found.linear.items()
    }
    unrotated = inputs | above_zero | set(limits)
    # Layers that read what is not rotated; layers with one weight read all alike.
    straight = {
        linear.shares or name
        for name, linear in found.linear.items()
        if not auto or reasons[name] is not None or linear.source in unrotated
    }
    for name, linear in found.linear.items():
        same, reason = plan.linear.get(linear.shares), reasons[name]
        if auto and linear.source in limits:
            plan.linear[name] = _with_known_scale(linear, limits[linear.source], same)
        elif reason is None:
            layout = None if auto else activations
            is_input, is_above_zero = linear.source in inputs, linear.source in above_zero
            rotates = (linear.shares or name) not in straight
            plan.linear[name] = with_scales_at_run_time(
                linear, layout, is_input, is_above_zero, same, rotates
            )
        else:
            weight = quantized_weight(linear) if same is None else same.weight
            plan.linear[name] = LinearQuantization(weight, note=reason)
        done()
    softmaxes = {step.name for step in program.steps if step.operator == "relax.nn.softmax"}
    for name, product in found.products.items():
        shapes = [specs[source].shape for source in product.sources]
        reason = _reason_against_product(product, activations, inputs, *shapes)
        if reason is None:
            plan.products[name] = _operands(activations, of_softmax=product.sources[0] in softmaxes)
        else:
            plan.skipped[name] = reason
    for name, recurrent in found.recurrent.items():
        plan.linear[name] = _recurrent(recurrent, activations)
        done()


def _with_known_scale(linear: Linear, limit: float, same: LinearQuantization | None) -> LinearQuantization:
    """One scale for a tensor whose values reach ``limit`` and no more."""
    weight = quantized_weight(linear, LINEAR_WEIGHTS) if same is None else same.weight
    scale = float(np.float32(limit / get_layout(LIMITED).max_grid))
    return LinearQuantization(weight, ActivationQuantization(LIMITED, scale))


def _reason_against_product(
    product: Product, activations: str, inputs: set[str], x: tuple[int, ...], y: tuple[int, ...]
) -> str | None:
    """Why a product of activations of shapes ``x`` and ``y`` stays float32; None: they are rounded."""
    if activations == FLOAT32:
        return NO_DATA
    if not inputs.isdisjoint(product.sources):
        return IS_INPUT
    if activations != "auto" and not get_layout(activations).signed:
        return NEVER_NEGATIVE.format(activations)
    is_matrix = len(x) == MATRIX  # whose rows would be taken for samples
    return FEW_MACS if is_matrix or x[-2] < LEAST_ROWS or min(y[-2:]) < LEAST_WIDTH else None


def _operands(activations: str, of_softmax: bool) -> tuple[ActivationQuantization, ActivationQuantization]:
    """Of a product of two activations; all that the right one holds has one scale, as sums run along its columns."""
    auto = SHARES if of_softmax else FACTORS
    left, right = auto if activations == "auto" else (activations, activations)
    return (
        ActivationQuantization(left, scale=None, by_samples=not of_softmax),
        ActivationQuantization(right, scale=None, by_samples=True),
    )


def _recurrent(layer: Recurrent, activations: str) -> LinearQuantization:
    """One scale for the hidden state, where gates keep it below a limit."""
    if activations == FLOAT32 or layer.limit is None:
        return LinearQuantization(quantized_weight(layer))
    layout = get_layout(STATE if activations == "auto" else activations)
    if not layout.signed:
        return LinearQuantization(quantized_weight(layer), note=NEVER_NEGATIVE.format(layout.name))
    scale = float(np.float32(layer.limit / layout.max_grid))
    return LinearQuantization(
        quantized_weight(layer, LINEAR_WEIGHTS), ActivationQuantization(layout.name, scale)
    )


def values_of_inputs(program: Program) -> set[str]:
    """The inputs of a program, and variables that hold values of them as they are."""
    names = set(program.inputs)
    for step in program.steps:
        if step.operator in HOLDS_VALUES and not names.isdisjoint(_names(step.arguments[0])):
            names.add(step.name)
    return names


def _names(argument: Any) -> list[str]:
    if isinstance(argument, Name):
        return [argument.name]
    return [name for part in argument for name in _names(part)] if isinstance(argument, tuple) else []


def _reason_for_float32(
    linear: Linear, activations: str, inputs: set[str], above_zero: set[str], shape: tuple[int, ...]
) -> str | None:
    """Why a layer's activation stays float32, empty where that is what was asked for; None: it is rounded."""
    if activations == FLOAT32:
        return ""
    outputs = linear.weight.shape[linear.weight_axis]
    macs = linear.macs * max(1.0, VECTOR / outputs)
    if linear.step.operator != "relax.matmul" and macs < LEAST_MACS * math.prod(shape):
        return FEW_MACS
    if activations == "auto":
        return IS_INPUT if linear.source in inputs and not reads_image(linear) else None
    fits = get_layout(activations).signed or linear.source in above_zero
    return None if fits else NEVER_NEGATIVE.format(activations)
