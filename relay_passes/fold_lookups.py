"""What is done to each row of a lookup is done to the table.

Runs after ``Recognize``. Before::

    lv = R.take(table, indices, axis=0)          # table (257, 64), indices (1, 2048)
    lv1 = R.nn.gelu(R.add(lv, bias))             # bias (64,)

After, where a table has no more rows than are looked up::

    lv1 = R.take(gelu(table + bias), indices, axis=0)

Reshapes that keep the rows become reshapes of the indices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.calibration.evaluate import evaluate_constant_call
from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.layout_rules import ELEMENTWISE
from tvm_qfp8.relay_passes.rewriter import MainRewriter

FOLDED = tuple(f"relax.{name}" for name in ELEMENTWISE)


@dataclass(frozen=True)
class _Lookup:
    table: np.ndarray
    indices: relax.Expr
    """Of the new program."""
    mode: str


@tvm.transform.module_pass(opt_level=0, name="FoldLookups")
class FoldLookups:
    """Rewrite ``main``; lookups that are not read any more are left to dead code elimination."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


class _Rewriter(MainRewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.lookups: dict[relax.Var, _Lookup] = {}

    def replacement(self, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if op_name(value) == "relax.take":
            self._note(var, value)
            return None
        x = self._read(value) if op_name(value) in (*FOLDED, "relax.reshape") else None
        if x is None:
            return None
        found = self._reshaped(x, value) if op_name(value) == "relax.reshape" else self._folded(x, value)
        if found is None:
            return None
        self.lookups[var] = found
        return relax.op.take(relax.const(found.table), found.indices, axis=0, mode=found.mode)

    def _note(self, var: relax.Var, value: relax.Call) -> None:
        table = self.constant(value.args[0])
        if table is None or str(value.ty.dtype) != "float32" or value.attrs.axis is None:
            return
        array, count = table.value.numpy(), math.prod(static_shape(value.args[1]) or (0,))
        if array.ndim == 2 and int(value.attrs.axis) == 0 and len(array) <= count:
            self.lookups[var] = _Lookup(array, self.expression(value.args[1]), str(value.attrs.mode))

    def _read(self, value: relax.Call) -> relax.Var | None:
        """The lookup that an operator reads, if it reads no other variable, and nothing else reads the lookup."""
        variables = [v for v in value.args if isinstance(v, relax.Var) and self.constant(v) is None]
        known = len(variables) == 1 and variables[0] in self.lookups and self.uses[variables[0]] == 1
        return variables[0] if known else None

    def _reshaped(self, x: relax.Var, value: relax.Call) -> _Lookup | None:
        lookup, shape = self.lookups[x], static_shape(value)
        if not shape or shape[-1] != lookup.table.shape[1]:
            return None
        indices = self.builder.emit(relax.op.reshape(lookup.indices, shape[:-1]))
        return replace(lookup, indices=indices)

    def _folded(self, x: relax.Var, value: relax.Call) -> _Lookup | None:
        if static_shape(x) != static_shape(value) or str(value.ty.dtype) != "float32":
            return None
        table, rank = self.lookups[x].table, len(shape_of(x))
        arguments: list = []
        for argument in value.args:
            constant = self.constant(argument) if isinstance(argument, relax.Var | GenericConst) else None
            if argument.same_as(x):
                arguments.append(table)
            elif constant is None:
                arguments.append(getattr(argument, "value", None))
            else:
                array = constant.value.numpy()
                row = array.size == 1 or (array.ndim <= rank and array.size == array.shape[-1])
                arguments.append(array.reshape(-1)[None] if row else None)
        if any(argument is None for argument in arguments):
            return None
        result = evaluate_constant_call(value, arguments)
        if result is None or result.shape != table.shape:
            return None
        return replace(self.lookups[x], table=np.ascontiguousarray(result, np.float32))
