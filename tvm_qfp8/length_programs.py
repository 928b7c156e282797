"""From the programs of several lengths to one module, see ``importers.open_length``.

Layers are calibrated in the program of the longest; those of the others have the same names and weights, and take the
same codes, scales and biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import ir, relax

from tvm_qfp8.calibration import Program, QuantizationPlan
from tvm_qfp8.calibration.evaluate import evaluate
from tvm_qfp8.errors import ModelError
from tvm_qfp8.lengths import cut, padded, varying_axes
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.schedules import GemmSchedule, ScheduleChooser
from tvm_qfp8.topi.static_memory import FUNCTION

TOLERANCE = 1e-4
"""Of the largest output: what float32 sums in another order may differ by."""


class SharedPanels:
    """Chooses schedules for all lengths so that they read the same packed weights: the first asked for decides."""

    def __init__(self, choose: ScheduleChooser) -> None:
        self._choose = choose
        self._vectors: dict[tuple, int] = {}

    def __call__(self, schedules: Any, isa: InstructionSet, shape: Any, threads: int) -> Any:
        chosen = self._choose(schedules, isa, shape, threads)
        if not isinstance(chosen, GemmSchedule):
            return chosen
        vectors = self._vectors.setdefault((isa.label, replace(shape, rows=0)), chosen.vectors)
        return chosen if vectors == chosen.vectors else chosen.for_vectors(vectors, isa, shape.rows)


def function_at(length: int) -> str:
    """The name of the function that runs inputs of a length; the longest is ``main``."""
    return f"main_{length}"


def padding_is_unseen(short: tvm.IRModule, long: tvm.IRModule, axes: Mapping[str, int]) -> bool:
    """Whether zeros behind the inputs of ``short`` leave its outputs as they are, in float32 on random inputs.

    So it is for networks with an attention mask among their inputs, and for causal ones.
    """
    random = np.random.default_rng(0)
    inputs, more = {}, {}
    extents = {name: spec.shape for name, spec in Program(long).inputs.items()}
    for name, spec in Program(short).inputs.items():
        if spec.dtype.startswith("float"):
            value = random.standard_normal(spec.shape).astype(spec.dtype)
        else:  # indices, or masks that leave at least the first
            value = random.integers(0, 2, spec.shape).astype(spec.dtype)
            if value.ndim:
                value[..., :1] = 1
        inputs[name] = value
        axis = axes.get(name)
        more[name] = value if axis is None else padded(value, axis, extents[name][axis])
    try:
        found, wider = evaluate(short, inputs), evaluate(long, more)
    except IndexError:  # an index of 1 may be one too many: nothing is known then
        return False
    name, axis = next(iter(axes.items()))
    lengths = inputs[name].shape[axis], more[name].shape[axis]
    moving = varying_axes([[array.shape for array in found], [array.shape for array in wider]])
    for own, other, axes_of_output in zip(found, wider, moving, strict=True):
        if any((own.shape[i], other.shape[i]) != lengths for i in axes_of_output):
            return False
        difference = np.subtract(own, cut(other, axes_of_output, lengths[0]), dtype=np.float64)
        if not np.abs(difference).max(initial=0) <= TOLERANCE * np.abs(own).max(initial=0):
            return False
    return True


def check_same_layers(
    program: tvm.IRModule, length: int, longest: tvm.IRModule, plan: QuantizationPlan
) -> None:
    """Refuse a program in which a layer that the plan decides on is missing or has other weights.

    Raises
    ------
    ModelError
    """
    steps = {step.name: step for step in Program(program).steps}
    names = {*plan.linear, *plan.products, *plan.embeddings}
    for step in Program(longest).steps:
        if step.name not in names:
            continue
        other = steps.get(step.name)
        if other is None or not _same_layer(step, other):
            raise ModelError(
                f"the model is another network at length {length} than at the longest: layer {step.name} "
                f"({step.operator.removeprefix('relax.')}) is not the same; compile a module for each length"
            )


def _same_layer(step: Any, other: Any) -> bool:
    if other.operator != step.operator or len(other.arguments) != len(step.arguments):
        return False
    pairs = zip(step.arguments, other.arguments, strict=True)
    # Constant indices and numbers of steps may follow the length.
    return all(np.array_equal(a, b) for a, b in pairs if isinstance(a, np.ndarray) and a.dtype.kind == "f")


def joined(longest: tvm.IRModule, shorter: Mapping[int, tvm.IRModule]) -> tvm.IRModule:
    """All lowered programs in one module: ``main`` and ``main_16``, ``main_32``, ..."""
    functions: dict[ir.GlobalVar, ir.BaseFunc] = dict(longest.functions_items())
    for length, mod in shorter.items():
        # What fills the module's memory stands in the longest, which was lowered last.
        own = {
            var.name_hint: function for var, function in mod.functions_items() if var.name_hint != FUNCTION
        }
        names = {name: ir.GlobalVar(f"{name}_{length}") for name in own}
        for name, function in own.items():
            renamed = _renamed(function, names)
            relax.expr._update_type(names[name], renamed.ty)
            functions[names[name]] = renamed
    return tvm.IRModule(functions, attrs=longest.attrs, global_infos=longest.global_infos)


def _renamed(function: ir.BaseFunc, names: Mapping[str, ir.GlobalVar]) -> ir.BaseFunc:
    def rename(var: ir.GlobalVar, _mutator) -> ir.GlobalVar:
        return names.get(var.name_hint, var)

    renamed = tvm_ffi.structural_mutate(function, [(ir.GlobalVar, rename)])
    symbol = (function.attrs or {}).get("global_symbol")
    return renamed if symbol is None else renamed.with_attr("global_symbol", names[symbol].name_hint)
