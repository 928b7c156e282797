"""A canonical Relax module as a list of NumPy steps, and its float32 evaluation.

Attributes and constants are turned into Python values once, so that a step costs about what NumPy costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_qfp8.calibration.fallback import compile_call
from tvm_qfp8.calibration.operators import TABLE
from tvm_qfp8.data_movement import MOVES_DATA
from tvm_qfp8.errors import ModelError
from tvm_qfp8.layer_names import layer_name

MOVING_STEPS = MOVES_DATA | {"alias", "tuple_get_item"}
"""Operators of steps whose results are values of their first argument, elsewhere."""


@dataclass(frozen=True)
class Name:
    """An argument that is the value of a variable."""

    name: str


@dataclass(frozen=True)
class TensorSpec:
    """Static shape and NumPy dtype of a value."""

    shape: tuple[int, ...]
    dtype: str


Spec = TensorSpec | tuple["Spec", ...]


@dataclass(frozen=True)
class Step:
    """One binding: ``run(values)`` gives the value of variable ``name`` from those of ``reads``."""

    name: str
    operator: str
    attrs: SimpleNamespace
    arguments: tuple[Any, ...]
    reads: tuple[str, ...]
    spec: Spec
    run: Callable[[Mapping[str, Any]], Any]


def _python(value: Any) -> Any:
    """An attribute as a plain Python value."""
    if isinstance(value, tvm.tirx.IntImm | tvm.tirx.FloatImm):
        return value.value
    if isinstance(value, list | tuple) or type(value).__name__ == "Array":
        return tuple(_python(part) for part in value)
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(value)


def _attributes(call: tvm.ir.Call, result: Spec) -> SimpleNamespace:
    if isinstance(call.attrs, tvm.ir.DictAttrs):
        return SimpleNamespace(result=result, **{name: _python(value) for name, value in call.attrs.items()})
    fields = () if call.attrs is None else type(call.attrs).__tvm_ffi_type_info__.fields
    return SimpleNamespace(result=result, **{f.name: _python(getattr(call.attrs, f.name)) for f in fields})


def _spec(type_: Any) -> Spec:
    if isinstance(type_, relax.TupleType):
        return tuple(_spec(part) for part in type_.fields)
    if isinstance(type_, relax.ShapeType):
        return TensorSpec((int(type_.ndim),), "int64")
    return TensorSpec(tuple(int(extent) for extent in type_.shape.values), str(type_.dtype))


def _argument(expr: Any) -> Any:
    """An argument as a Name or as a Python value, tuples of these included."""
    if isinstance(expr, relax.Var):
        return Name(layer_name(expr))
    if isinstance(expr, tvm.ir.GenericConst):
        return expr.value.numpy()
    if isinstance(expr, relax.ShapeExpr):
        return tuple(int(extent) for extent in expr.values)
    if isinstance(expr, relax.Tuple):
        return tuple(_argument(part) for part in expr.fields)
    if isinstance(expr, tvm.ir.GlobalVar):
        return None  # the callee of call_tir: only the compiled fallback needs it
    return _python(expr)


def resolve(argument: Any, values: Mapping[str, Any]) -> Any:
    """The value of an argument, tuples of these included."""
    if isinstance(argument, Name):
        return values[argument.name]
    if isinstance(argument, tuple):
        return tuple(resolve(part, values) for part in argument)
    return argument


def _step(mod: tvm.IRModule, binding: Any) -> Step:
    value = binding.value
    name, spec = layer_name(binding.var), _spec(binding.var.ty)
    reads = tuple(layer_name(var) for var in relax.analysis.free_vars(value))
    attrs = SimpleNamespace()
    arguments: tuple[Any, ...]
    run: Callable[[Mapping[str, Any]], Any]
    if isinstance(value, relax.TupleGetItem):
        operator, arguments = "tuple_get_item", (_argument(value.tuple_value), int(value.index))
        run = lambda values: resolve(arguments[0], values)[arguments[1]]  # noqa: E731
    elif isinstance(value, tvm.ir.Call) and isinstance(value.op, tvm.ir.Op):
        operator, attrs = value.op.name, _attributes(value, spec)
        arguments = tuple(_argument(part) for part in value.args)
        if operator in TABLE:
            function = TABLE[operator]
            run = lambda values: function(attrs, *(resolve(part, values) for part in arguments))  # noqa: E731
        else:
            run = compile_call(mod, value)
    elif isinstance(value, relax.Var | relax.Tuple | tvm.ir.GenericConst):
        operator, arguments = "alias", (_argument(value),)
        run = lambda values: resolve(arguments[0], values)  # noqa: E731
    else:
        raise ModelError(
            f"binding {name} holds a {type(value).__name__}: calibration needs one dataflow block of Relax "
            "operators; inline functions and branches before"
        )
    return Step(name, operator, attrs, arguments, reads, spec, run)


def _repeats_name(binding: Any) -> bool:
    """Whether this only makes an output of the block of a variable that is called the same (``MainRewriter``)."""
    return isinstance(binding.value, relax.Var) and binding.value.name == binding.var.name


class Program:
    """The steps of ``mod["main"]`` in binding order.

    Attributes
    ----------
    inputs : dict of str to TensorSpec
        The parameters of ``main``.
    steps : list of Step
    result : Name, array or tuple of these
        What ``main`` returns.
    last_reads : dict of str to list of str
        For each step the variables that no later one reads.
    """

    def __init__(self, mod: tvm.IRModule) -> None:
        main = mod["main"]
        self.inputs: dict[str, Any] = {layer_name(var): _spec(var.ty) for var in main.params}
        self.steps = [
            _step(mod, binding)
            for block in main.body.blocks
            for binding in block.bindings
            if not _repeats_name(binding)
        ]
        self.result = _argument(main.body.body)
        last_reader = {name: step.name for step in self.steps for name in step.reads}
        self.last_reads: dict[str, list[str]] = {step.name: [] for step in self.steps}
        for name, reader in last_reader.items():
            self.last_reads[reader].append(name)

    def outputs(self, values: Mapping[str, Any]) -> list[np.ndarray]:
        """The module's results as a list, from the values of all variables."""
        result = resolve(self.result, values)
        return list(result) if isinstance(result, tuple) else [result]

    def result_names(self) -> set[str]:
        """Variables that ``main`` returns."""
        parts = self.result if isinstance(self.result, tuple) else (self.result,)
        return {part.name for part in parts if isinstance(part, Name)}


def evaluate(mod: tvm.IRModule, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run a canonical module in float32 by NumPy.

    Parameters
    ----------
    mod : IRModule
        In canonical form: one static ``main``, constants bound.
    inputs : dict of str to array
        By parameter name, in the shapes and dtypes of ``main``.

    Returns
    -------
    list of arrays, one for each result.
    """
    program = Program(mod)
    values: dict[str, Any] = dict(inputs)
    with np.errstate(all="ignore"):
        for step in program.steps:
            values[step.name] = step.run(values)
    return program.outputs(values)


def evaluate_constant_call(call: tvm.ir.Call, arguments: Sequence[Any]) -> np.ndarray | None:
    """The value of a call whose tensor ``arguments`` are given as arrays; None where no NumPy twin exists."""
    if not isinstance(call.op, tvm.ir.Op) or call.op.name not in TABLE:
        return None
    if isinstance(call.ty, relax.TupleType):
        return None
    result = TABLE[call.op.name](_attributes(call, _spec(call.ty)), *arguments)
    return np.asarray(result)
