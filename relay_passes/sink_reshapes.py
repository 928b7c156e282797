"""Moves reshapes that keep the last axis below dense layers and elementwise operators.

Files often flatten a tensor before a dense layer and restore it behind. Before::

    lv = R.reshape(x, R.shape([64, 384]))         # x (1, 64, 384)
    lv1 = R.add(R.matmul(lv, w), bias)
    lv2 = R.reshape(lv1, R.shape([1, 64, 1536]))
    lv3 = R.nn.gelu(lv2)

After, once SimplifyViews has joined the reshapes::

    lv3 = R.nn.gelu(R.add(R.matmul(x, w), bias))

so that a dense layer and what follows it can become one kernel.
"""

from __future__ import annotations

import math

import tvm
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape, tensor_arguments
from tvm_qfp8.relay_passes.rewriter import MainRewriter
from tvm_qfp8.tables.operators import FUNCTIONS
from tvm_qfp8.topi.elementwise import ELEMENTWISE


@tvm.transform.module_pass(opt_level=0, name="SinkReshapes")
class SinkReshapes:
    """Rewrite ``main``; reshapes that are not read any more are removed."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


class _Rewriter(MainRewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.sources: dict[relax.Var, relax.Expr] = {}
        """From a variable of the old program to the new expression that it is a reshape of, same last axis."""

    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        if op_name(value) == "relax.reshape" and static_shape(var) and isinstance(value.args[0], relax.Var):
            self.keep(var, value)
            self._note_source(var, value.args[0])
            return
        arguments = self._unshaped(var, value)
        if arguments is None:
            self.keep(var, value)
            return
        rest = [self.expression(argument) for argument in value.args[len(arguments) :]]
        call = relax.Call(value.op, [*arguments, *rest], value.attrs, value.ty_args)
        self.sources[var] = self.builder.emit(call, var.name)
        reshaped = relax.op.reshape(self.sources[var], shape_of(var))
        self.variables[var] = self.builder.emit(reshaped, f"{var.name}_reshaped")

    def _note_source(self, var: relax.Var, before: relax.Var) -> None:
        source = self.sources.get(before, self.expression(before))
        shape, wanted = static_shape(source), shape_of(var)
        if not shape:
            return
        if shape[-1] == wanted[-1]:
            self.sources[var] = source
            return
        # Heads joined again: (1, 64, 12, 32) -> (64, 384) starts from (1, 64, 384).
        for rank in range(len(wanted), len(shape)):
            if math.prod(shape[:rank]) == math.prod(wanted[:-1]):
                joined = relax.op.reshape(source, (*shape[:rank], wanted[-1]))
                self.sources[var] = self.builder.emit(joined, f"{var.name}_joined")
                return

    def _unshaped(self, var: relax.Var, value: relax.Expr) -> list[relax.Expr] | None:
        """The tensor arguments before their reshapes, None where the operator has to stay behind them."""
        if not isinstance(value, relax.Call) or static_shape(var) is None:
            return None
        arguments = tensor_arguments(value)
        if op_name(value) == "relax.matmul":
            x, weight = arguments
            dense = isinstance(weight, GenericConst) and len(shape_of(weight)) == 2
            return [self.sources[x], weight] if dense and x in self.sources else None
        if op_name(value) not in (*ELEMENTWISE, *FUNCTIONS, "relax.qfp8.trained"):
            return None
        if op_name(value) == "relax.nn.prelu":  # it names its axis
            return None
        shapes = {shape_of(self.sources[a]) for a in arguments if a in self.sources}
        if len(shapes) != 1:
            return None
        found = []
        for argument in arguments:
            shape = static_shape(argument)
            if argument in self.sources and shape == shape_of(var):
                found.append(self.sources[argument])
            elif isinstance(argument, GenericConst) and shape is not None and _per_column(shape, var):
                found.append(relax.const(argument.value.numpy().reshape(shape[-1:]), str(argument.ty.dtype)))
            else:
                return None
        return found


def _per_column(shape: tuple[int, ...], var: relax.Var) -> bool:
    """A constant with one value for all, or one for each place of the last axis."""
    return all(extent == 1 for extent in shape[:-1]) and shape[-1:] in ((), (1,), shape_of(var)[-1:])
