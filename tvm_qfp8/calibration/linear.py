"""Linear operators and products of activations: which are quantized, and what they compute then."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from tvm_qfp8.calibration.contents import Contents, contents
from tvm_qfp8.calibration.evaluate import Name, Program, Step, TensorSpec
from tvm_qfp8.calibration.operators import TABLE
from tvm_qfp8.calibration.plan import ActivationQuantization, LinearQuantization
from tvm_qfp8.calibration.recurrent_layer import RECURRENT, Recurrent
from tvm_qfp8.errors import CalibrationError, ModelError
from tvm_qfp8.quantize import QTensor, quantize

WEIGHTS, LINEAR_WEIGHTS = ("E2M5", "E1M6"), ("E1M6",)
"""Layouts of weights: in general, and where bytes are multiplied as they are. Of many weights to a channel E2M5 is the
best; of a few, as in depthwise and first convolutions, often E1M6."""

COMPARED_CHANNELS = 64
"""Output channels on which roundings of a weight are compared; all would take long and say the same."""

LINEAR = ("relax.matmul", "relax.nn.conv2d", "relax.nn.conv2d_transpose")
"""Linear operators of canonical form."""


def input_axis(operator: str, attrs: Any) -> int:
    """Of a linear call's weight: that of the channels of what it reads, of a depthwise convolution's those of both."""
    if operator == "relax.matmul":
        return 0
    return str(attrs.kernel_layout).index("I" if int(attrs.groups) == 1 else "O")


@dataclass(frozen=True)
class Linear:
    """A linear call with a constant float32 weight.

    Attributes
    ----------
    step : Step
    source : str
        Variable that holds the activation.
    weight : float32 array in the operator's own layout
    weight_axis, channel_axis : int
        Output channels in the weight and in the operator's result.
    shares : str
        Where others have the same weight, too, as written-out steps of a recurrent layer have: the first; else empty.
        They keep one and the same weight, so it is rounded to nearest, and no factor of an activation moves into it.
    """

    step: Step
    source: str
    weight: np.ndarray
    weight_axis: int
    channel_axis: int
    shares: str = ""

    @property
    def is_depthwise(self) -> bool:
        """A convolution with one input channel in each group."""
        attrs = self.step.attrs
        is_grouped = self.step.operator == "relax.nn.conv2d" and int(attrs.groups) > 1
        return is_grouped and self.weight.shape[attrs.kernel_layout.index("I")] == 1

    @property
    def reads_rows(self) -> bool:
        """A dense layer, over the last axis: a matmul, or a 1x1 convolution over all or some pixels in NHWC."""
        if self.step.operator != "relax.nn.conv2d":
            return self.step.operator == "relax.matmul"
        attrs = self.step.attrs
        window = [self.weight.shape[attrs.kernel_layout.index(axis)] for axis in "HW"]
        plain = [*window, int(attrs.groups)] == [1] * 3
        return plain and not any(map(int, attrs.padding)) and attrs.data_layout == attrs.out_layout == "NHWC"

    @property
    def matrix(self) -> np.ndarray:
        """The weight of what reads rows, ``(channels, out_channels)``."""
        return np.moveaxis(self.weight, self.weight_axis, -1).reshape(-1, self.weight.shape[self.weight_axis])

    @property
    def macs(self) -> int:
        """Multiply-adds of one call, in a transposed convolution those of pixels."""
        outputs = int(np.prod(self.step.spec.shape))  # type: ignore[union-attr]
        transposed = self.step.operator == "relax.nn.conv2d_transpose"
        apart = int(np.prod([int(s) for s in self.step.attrs.strides])) if transposed else 1
        return outputs * self.weight.size // (self.weight.shape[self.weight_axis] * apart)

    def output(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """The operator's float32 result for an activation and a weight."""
        return TABLE[self.step.operator](self.step.attrs, x, weight)

    def quantized_output(self, x: np.ndarray, chosen: LinearQuantization, weight: np.ndarray) -> np.ndarray:
        """The same with the activation rounded to its layout; ``weight`` is already the rounded one."""
        return self.output(x if chosen.activation is None else chosen.activation.rounded(x), weight)

    def meeting(self, activation: ActivationQuantization) -> Linear:
        """The layer with the weight that meets an activation as it is rounded."""
        if not activation.changes_weights:
            return self
        axis = input_axis(self.step.operator, self.step.attrs)
        return replace(self, weight=activation.met_by(self.weight, axis))

    def per_channel(self, vector: np.ndarray) -> np.ndarray:
        """A vector of output channels, in a shape that broadcasts to the operator's result."""
        after = len(self.step.spec.shape) - 1 - self.channel_axis  # type: ignore[union-attr]
        return vector.reshape((-1, *(1,) * after))

    def rows(self, array: np.ndarray) -> np.ndarray:
        """An array shaped as the result, as ``(pixels or tokens, out_channels)``."""
        return np.moveaxis(array, self.channel_axis, -1).reshape(-1, array.shape[self.channel_axis])


@dataclass(frozen=True)
class Product:
    """A matmul of two activations, as in attention; ``sources`` are the variables of its operands."""

    step: Step
    sources: tuple[str, str]

    def output(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The float32 product."""
        return TABLE[self.step.operator](self.step.attrs, x, y)

    def quantized_output(
        self, x: np.ndarray, y: np.ndarray, chosen: tuple[ActivationQuantization, ActivationQuantization]
    ) -> np.ndarray:
        """The product of the operands rounded to their layouts."""
        return self.output(chosen[0].rounded(x), chosen[1].rounded(y))


def _axes(step: Step, weight: np.ndarray) -> tuple[int, int]:
    if step.operator == "relax.matmul":
        return 1, len(step.spec.shape) - 1  # type: ignore[union-attr]
    return step.attrs.kernel_layout.index("O"), step.attrs.out_layout.index("C")


def _check_patterns(program: Program, skip: tuple[str, ...]) -> None:
    """Refuse patterns that name nothing that could be quantized."""
    steps = [step for step in program.steps if step.operator in (*LINEAR, RECURRENT, "relax.take")]
    for pattern in skip:
        if not any(skipped_by_name(step, (pattern,)) for step in steps):
            names = [step.name for step in steps]
            close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.6) or names[:1]
            example = f", such as {close[0]!r}" if close else ""
            raise CalibrationError(
                f"skip: no layer is called {pattern!r}; give a name of the report{example}, or a pattern with *"
            )


def skipped_by_name(step: Step, skip: tuple[str, ...]) -> str | None:
    """The reason, if a pattern of the configuration names a step or its operator."""
    for pattern in skip:
        if fnmatchcase(step.name, pattern) or fnmatchcase(step.operator, pattern):
            return f"skipped by configuration ({pattern})"
    return None


def _reason_to_skip(step: Step, skip: tuple[str, ...]) -> str | None:
    """Why a linear call stays float32, or None."""
    activation, weight = step.arguments[:2]
    spec = step.spec
    if not isinstance(spec, TensorSpec) or spec.dtype != "float32":
        return "the result is not float32"
    configured = skipped_by_name(step, skip)
    if configured is not None:
        return configured
    if not isinstance(weight, np.ndarray):
        if step.operator == "relax.matmul" and isinstance(activation, Name):
            return None
        return "the right operand is computed"
    if not isinstance(activation, Name):
        return "both operands are constant"
    if step.operator == "relax.matmul" and weight.ndim != 2:
        return f"the weight has {weight.ndim} dimensions; 2 are supported"
    return None


@dataclass
class LinearSteps:
    """What there is to quantize in a program, each by variable name in binding order.

    Attributes
    ----------
    linear : dict of str to Linear
    products : dict of str to Product
    recurrent : dict of str to Recurrent
    skipped : dict of str to str
        What stays float32, with the reason.
    """

    linear: dict[str, Linear] = field(default_factory=dict)
    products: dict[str, Product] = field(default_factory=dict)
    recurrent: dict[str, Recurrent] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def find_linear(program: Program, skip: Iterable[str] = ()) -> LinearSteps:
    """Linear calls and products of a program.

    Parameters
    ----------
    program : Program
        From a canonical module.
    skip : iterable of str
        Names of layers or operators to leave in float32; shell patterns (``encoder.*``) work.

    Raises
    ------
    CalibrationError
        A pattern names nothing that could be quantized.
    ModelError
        A weight holds NaN or infinity.
    """
    patterns = tuple(skip)
    _check_patterns(program, patterns)
    found = LinearSteps()
    for step in program.steps:
        if step.operator not in (*LINEAR, RECURRENT):
            continue
        name, (activation, weight) = step.name, step.arguments[:2]
        recurrent = step.operator == RECURRENT
        reason = skipped_by_name(step, patterns) if recurrent else _reason_to_skip(step, patterns)
        if reason is not None:
            found.skipped[name] = reason
        elif recurrent:
            found.recurrent[name] = Recurrent.of(step)
        elif isinstance(weight, Name):
            found.products[name] = Product(step, (activation.name, weight.name))
        else:
            _check_finite(step, weight)
            linear = Linear(step, activation.name, weight, *_axes(step, weight))
            if linear.reads_rows and weight.shape[linear.weight_axis] == 1:
                # Such as the expectation over distances in detectors of the YOLO family, which is in pixels.
                found.skipped[name] = "one multiply-add a value: rounding saves nothing"
            else:
                found.linear[name] = linear
    for first, *others in _of_equal_weight(found.linear):
        if others:
            for name in (first, *others):
                found.linear[name] = replace(found.linear[name], shares=first)
    return found


def _of_equal_weight(linears: dict[str, Linear]) -> list[list[str]]:
    """Names of the operators, those of the same kind with equal weights together."""
    names: dict[tuple[str, Contents], list[str]] = {}
    for name, linear in linears.items():
        names.setdefault((linear.step.operator, contents(linear.weight)), []).append(name)
    return list(names.values())


def _check_finite(step: Step, weight: np.ndarray) -> None:
    bad = int(weight.size - np.count_nonzero(np.isfinite(weight)))
    if bad:
        raise ModelError(
            f"the weight of {step.name} ({step.operator}) holds {bad} values that are NaN or infinite; "
            "only finite weights can be quantized: repair the model file"
        )


def read_only_by_linears(found: LinearSteps) -> dict[str, list[Linear]]:
    """The linear operators that read a variable, for those that no product of activations reads."""
    readers: dict[str, list[Linear]] = {}
    for linear in found.linear.values():
        readers.setdefault(linear.source, []).append(linear)
    products = {source for product in found.products.values() for source in product.sources}
    return {name: linears for name, linears in readers.items() if name not in products}


def quantized_weight(linear: Linear | Recurrent, layouts: Sequence[str] = WEIGHTS) -> QTensor:
    """A linear operator's weight in the layout of least squared error, one scale for each output channel.

    Layouts are compared on some channels.
    """
    axis = linear.weight_axis

    def error(layout: str) -> float:
        rounded = quantize(some, axis=axis, layout=layout, bias="mse").dequantize()
        return float(np.square(rounded - some).sum(dtype=np.float64))

    layout = layouts[0]
    if len(layouts) > 1:
        channels = linear.weight.shape[axis]
        picked = np.arange(0, channels, max(1, channels // COMPARED_CHANNELS))
        some = np.take(linear.weight, picked, axis)
        layout = min(layouts, key=error)
    return quantize(linear.weight, axis=axis, layout=layout, bias="mse")
