"""One operator compiled and run by TVM: what calibration does with an operator that NumPy has no twin for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_qfp8.errors import ModelError
from tvm_qfp8.layer_names import layer_name


def _renamed(expr: Any, parameters: dict[str, relax.Var]) -> Any:
    """``expr`` with the compiled function's parameters in place of the module's variables."""
    if isinstance(expr, relax.Var):
        return parameters[layer_name(expr)]
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([_renamed(part, parameters) for part in expr.fields])
    return expr


def _to_numpy(value: Any) -> Any:
    if isinstance(value, tvm.runtime.Tensor):
        return value.numpy()
    return tuple(_to_numpy(part) for part in value)


def _to_tensor(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_to_tensor(part) for part in value)
    # ascontiguousarray would give a scalar a dimension.
    return tvm.runtime.tensor(np.array(value, order="C"))


def compile_call(mod: tvm.IRModule, call: tvm.ir.Call) -> Callable[[Mapping[str, Any]], Any]:
    """A function that runs ``call`` alone on this machine, compiled when it is first needed.

    Parameters
    ----------
    mod : IRModule
        The module that holds the call; its other functions stay reachable (``call_tir`` needs them).
    call : relax call
        Its variables become the parameters of the compiled function.

    Returns
    -------
    Function of {variable name: array or tuple of arrays} that gives an array or a tuple of arrays; it raises
    ModelError if TVM cannot compile the call.
    """
    variables = list(relax.analysis.free_vars(call))

    @cache
    def machine() -> relax.VirtualMachine:
        try:
            executable = tvm.compile(_alone(mod, call, variables), target="llvm")
            return relax.VirtualMachine(executable, tvm.cpu())
        except Exception as error:
            raise ModelError(
                f"{call.op.name} can neither be evaluated by NumPy nor compiled by TVM "
                f"({str(error).splitlines()[0]}); replace this operator in the model"
            ) from error

    def run(values: Mapping[str, Any]) -> Any:
        arguments = [_to_tensor(values[layer_name(var)]) for var in variables]
        return _to_numpy(machine()["main"](*arguments))

    return run


def _alone(mod: tvm.IRModule, call: tvm.ir.Call, variables: list[relax.Var]) -> tvm.IRModule:
    """A module whose ``main`` is the call, with the module's TIR functions."""
    parameters = {layer_name(var): relax.Var(var.name, var.ty) for var in variables}
    builder = relax.BlockBuilder()
    with builder.function("main", list(parameters.values())):
        arguments = [_renamed(argument, parameters) for argument in call.args]
        builder.emit_func_output(builder.emit(tvm.ir.Call(call.op, arguments, call.attrs, call.ty_args)))
    functions = {gv: f for gv, f in mod.functions.items() if isinstance(f, tvm.tirx.PrimFunc)}
    return tvm.IRModule({**functions, **builder.get().functions})
