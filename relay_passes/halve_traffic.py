"""Rounds float32 tensors between kernels to float16 or bfloat16, so that they are kept in half the memory.

What one layer's kernel hands to the next is codes, but for what must stay finer: the sums of a residual network above
all, which every block reads and writes. Before::

    lv2 = R.add(R.qfp8.conv2d(...), lv1)          # (1, 56, 56, 256)
    lv3 = R.qfp8.encode(lv2, ...)
    lv9 = R.add(R.qfp8.conv2d(...), lv2)

After::

    lv2 = R.add(R.qfp8.conv2d(...), lv1)
    half = R.qfp8.halve(lv2, dtype="float16")
    lv3 = R.qfp8.encode(lv2, ...)                 # in lv2's kernel
    lv9 = R.add(R.qfp8.conv2d(...), half)

Rounding to float16 leaves 73 dB, far more than any 8-bit layout. Float16 ends at 65504: only tensors are rounded of
which that is proved. Codes cannot be more than their layout's greatest, so weights bound what a layer gives, and that
the sums. Where layers find scales at run time nothing is bounded, but the scales' own encode leaves some 20 dB fewer
than bfloat16's 55, which has float32's range: what such layers give is rounded to that. The choice does not look at
the target: one whose kernels do not convert rounds all the same and keeps float32.
"""

from __future__ import annotations

import math

import numpy as np
import tvm
from tvm import relax

from tvm_qfp8.format import decode_grid
from tvm_qfp8.layer_names import layer_name
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.fuse import (
    GLOBAL_POOL,
    POINTWISE,
    Group,
    Single,
    is_pooling,
    joins_channels,
    op_name,
    partition,
    parts_of,
    read_by,
    results_of,
    shape_of,
    static_shape,
    tensor_arguments,
)
from tvm_qfp8.relay_passes.operands import array_of, layout_of
from tvm_qfp8.relay_passes.rewriter import MainRewriter

LAYERS = ("relax.qfp8.conv2d", "relax.qfp8.matmul")
ENCODES = ("relax.qfp8.encode_rows", "relax.qfp8.encode_samples")

LARGEST = 65400.0
"""Float16 ends at 65504; the rest is for what rounding adds to a bound."""

LEAST = 1.0
"""Of a bound, which is far above what is found: float16 is coarse below 2**-14."""

IMAGE_RANK = 4
"""Only images are worth it: rows of tokens are small, and norms read them."""

LARGE = 1 << 18
"""Elements of an image that convolutions over windows read: a megabyte of float32. Smaller ones stay in the second
cache, where MobileNetV3 without samples gains nothing."""

SHRINKING = ("gelu", "gelu_tanh", "silu", "mish", "hardswish", "tanh", "sigmoid", "hardsigmoid", "erf")
"""Functions whose results are no more than their argument or 1 in magnitude."""

KEEPING = (
    "relax.nn.relu",
    "relax.abs",
    "relax.negative",
    "relax.nn.max_pool2d",
    "relax.nn.avg_pool2d",
    *GLOBAL_POOL,
)
"""Operators whose results are no more than their argument."""


@tvm.transform.module_pass(opt_level=0, name="HalveTraffic")
class HalveTraffic:
    """Rewrite ``main``, of quantized layers; ``rounded`` gets the layers whose results are, and to which dtype."""

    def __init__(self, rounded: dict[str, str] | None = None) -> None:
        self.rounded = {} if rounded is None else rounded

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return _Rewriter(relax.transform.DeadCodeElimination()(mod), self.rounded).rewrite()


class _Rewriter(MainRewriter):
    def __init__(self, mod: tvm.IRModule, dtypes: dict[str, str]) -> None:
        super().__init__(mod)
        self.dtypes = dtypes

    def body(self) -> None:
        results = results_of(self.main)
        for block in self.main.body.blocks:
            steps = partition(block, results)
            chosen = self._between_kernels(steps) - results
            group_of = {
                var: [v for v, _ in step.members]
                for step in steps
                if isinstance(step, Group)
                for var in step.outputs
            }
            bounds: dict[relax.Expr, float] = {}
            at_run_time: set[relax.Expr] = set()
            rounded: dict[relax.Var, relax.Var] = {}
            for binding in block.bindings:
                var, value = binding.var, binding.value
                bounds[var] = _bound(value, bounds)
                read = _parts_read(value) | _read_by_codes_of_weights(value)
                if _has_scales_of_run_time(value) or not at_run_time.isdisjoint(read):
                    at_run_time.add(var)
                exact = {read: self.variables[read] for read in rounded if var not in group_of[read]}
                self.variables.update((read, rounded[read]) for read in exact)
                self.binding(var, value)
                self.variables.update(exact)
                dtype = _dtype(bounds[var], var in at_run_time) if var in chosen else None
                if dtype is not None:
                    call = qfp8_ops.halve(self.variables[var], dtype)
                    rounded[var] = self.builder.emit(call, f"{var.name}_{dtype}")
                    self.dtypes[layer_name(group_of[var][0])] = dtype

    def _between_kernels(self, steps: list[Group | Single]) -> set[relax.Var]:
        """Images that kernels write and only kernels read that take float16 and bfloat16."""
        written = {var for step in steps if isinstance(step, Group) for var in step.outputs}
        images = {
            var
            for var in written
            if len(static_shape(var) or ()) == IMAGE_RANK and str(var.ty.dtype) == "float32"
        }
        read: set[relax.Var] = set()
        for step in steps:
            images -= _refused(step)
            if not _encodes(step):
                read |= read_by(step)
        # What is only encoded is read once, most often from cache: rounding would cost what it saves.
        return images & read


def _encodes(step: Group | Single) -> bool:
    """With scales found at run time; such encodes take float16 and bfloat16."""
    return isinstance(step, Single) and op_name(step.value) in ENCODES


def _dtype(bound: float, at_run_time: bool) -> str | None:
    """What a value is rounded to, None for nothing."""
    if LEAST <= bound <= LARGEST:
        return "float16"
    return "bfloat16" if at_run_time else None


def _has_scales_of_run_time(value: relax.Expr) -> bool:
    return op_name(value) in LAYERS and len(value.args) > 4


def _read_by_codes_of_weights(value: relax.Expr) -> set[relax.Expr]:
    """What a layer reads as it is: its own weights, which are codes, leave fewer dB than bfloat16 does."""
    if op_name(value) not in LAYERS or layout_of(value.args[1]) is None:
        return set()
    return {value.args[0]} if layout_of(value.args[0]) is None else set()


def _parts_read(value: relax.Expr) -> set[relax.Expr]:
    """The tensors whose elements, combined with others, are those of a value."""
    name = op_name(value)
    if name == "relax.concat":
        return set(parts_of(value))
    return set(tensor_arguments(value)) if name in POINTWISE or name and is_pooling(value) else set()


def _refused(step: Group | Single) -> set[relax.Var]:
    """What a step reads that it must have in float32."""
    if isinstance(step, Single):
        return set() if _encodes(step) else set(relax.analysis.free_vars(step.value))
    inner = {var for var, _ in step.members}
    anchor_var, _ = step.members[0]
    found: set[relax.Var] = set()
    for var, call in step.members:
        read = {argument for argument in tensor_arguments(call) if isinstance(argument, relax.Var)} - inner
        if var is anchor_var and (is_pooling(call) or joins_channels(call) or _is_window_of_floats(call)):
            continue
        if op_name(call) not in POINTWISE:
            found |= read
        else:
            found |= {argument for argument in read if shape_of(argument) != shape_of(var)}
    return found


def _is_window_of_floats(call: relax.Call) -> bool:
    """A convolution over windows of a large image, not codes, by weights that are; most often a depthwise one."""
    if op_name(call) != "relax.qfp8.conv2d" or not _read_by_codes_of_weights(call):
        return False
    _, *kernel, _ = shape_of(call.args[1])
    return kernel != [1, 1] and math.prod(shape_of(call.args[0])) >= LARGE


def _bound(value: relax.Expr, bounds: dict[relax.Expr, float]) -> float:
    """What no element of a value exceeds in magnitude; infinity where nothing is known."""
    name = op_name(value)
    if name in LAYERS:
        return _bound_of_linear(value)
    if name == "relax.qfp8.decode":
        layout = layout_of(value.args[0])
        return math.inf if layout is None else layout.max_grid * float(value.attrs["scale"])
    arguments = [_bound_of(a, bounds) for a in tensor_arguments(value)] if name else []
    if name in ("relax.add", "relax.subtract"):
        return sum(arguments)
    if name == "relax.multiply":
        return math.prod(arguments) if 0.0 not in arguments else 0.0
    if name == "relax.concat":
        return max(_bound_of(part, bounds) for part in parts_of(value))
    if name in ("relax.maximum", "relax.minimum"):
        return max(arguments)
    if name == "relax.nn.leakyrelu":
        return arguments[0] * max(1.0, abs(float(value.attrs.alpha)))
    if name == "relax.clip":
        return max(abs(float(value.args[1].value)), abs(float(value.args[2].value)))
    if name == "relax.qfp8.interpolate" and str(value.attrs["function"]) in SHRINKING:
        return max(arguments[0], 1.0) + float(value.attrs["max_error"])
    return arguments[0] if name in KEEPING else math.inf


def _bound_of(argument: relax.Expr, bounds: dict[relax.Expr, float]) -> float:
    if isinstance(argument, tvm.ir.GenericConst) and str(argument.ty.dtype) == "float32":
        return float(np.abs(argument.value.numpy()).max(initial=0.0))
    return bounds.get(argument, math.inf)


def _bound_of_linear(call: relax.Call) -> float:
    """Of codes times weights; a scale that is found at run time has no bound."""
    x, weight, a, bias = call.args[:4]
    activation, layout = layout_of(x), layout_of(weight)
    if activation is None or layout is None or _has_scales_of_run_time(call):
        return math.inf
    grid = np.abs(decode_grid(array_of(weight), layout)).astype(np.float64)
    sums = grid.reshape(len(grid), -1).sum(axis=1) * activation.max_grid
    return float(
        (sums * np.abs(array_of(a).reshape(-1)) + np.abs(array_of(bias).reshape(-1))).max(initial=0.0)
    )
