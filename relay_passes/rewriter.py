"""The walk that most passes share: rebuild ``main`` binding by binding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import tvm
from tvm import relax
from tvm.ir import GenericConst


class MainRewriter:
    """Copies the one dataflow block of ``main``; a pass overrides ``replacement`` or ``binding`` (and ``parameter``).

    Attributes
    ----------
    builder : relax.BlockBuilder
        Where new bindings are emitted.
    variables : dict
        From variables of the old program to expressions of the new one.
    definition : dict
        From variables of the old program to what they are bound to.
    uses : dict
        How often each variable of the old program is read.
    """

    def __init__(self, mod: tvm.IRModule) -> None:
        self.main = mod["main"]
        self.mod = mod
        self.builder = relax.BlockBuilder()
        self.definition: dict[relax.Var, relax.Expr] = {}
        self.uses: dict[relax.Var, int] = {}
        for block in self.main.body.blocks:
            for binding in block.bindings:
                self.definition[binding.var] = binding.value
                relax.analysis.post_order_visit(binding.value, self._count)
        relax.analysis.post_order_visit(self.main.body.body, self._count)
        self.variables: dict[relax.Var, relax.Expr] = {}

    @cached_property
    def readers(self) -> Mapping[relax.Var, list[relax.Var]]:
        """What is bound to something that reads a variable of the old program; an empty list for others."""
        found: dict[relax.Var, list[relax.Var]] = defaultdict(list)
        for var, value in self.definition.items():
            for read in relax.analysis.free_vars(value):
                found[read].append(var)
        return found

    def _count(self, expr) -> None:
        if isinstance(expr, relax.Var):
            self.uses[expr] = self.uses.get(expr, 0) + 1

    def parameter(self, old: relax.Var) -> relax.Var:
        """The new program's parameter."""
        return relax.Var(old.name, old.ty)

    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        """Emit what ``var = value`` becomes and note it in ``variables``."""
        found = self.replacement(var, value)
        if found is None:
            self.keep(var, value)
        else:
            self.variables[var] = self.builder.emit(found, var.name)

    def replacement(self, _var: relax.Var, _value: relax.Expr) -> relax.Expr | None:
        """What is emitted instead of a value, over the new program's variables; None for the value itself."""
        return None

    def keep(self, var: relax.Var, value: relax.Expr) -> None:
        """Emit the binding unchanged; a second name for a variable is dropped."""
        expression = self.expression(value)
        second = isinstance(value, relax.Var)
        self.variables[var] = expression if second else self.builder.emit(expression, var.name)

    def expression(self, expr: relax.Expr) -> relax.Expr:
        """The expression over the new program's variables."""
        if isinstance(expr, relax.Var | relax.GlobalVar):
            return self.variables[expr]
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self.expression(field) for field in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self.expression(expr.tuple_value), expr.index)
        if isinstance(expr, relax.Call):
            return relax.Call(expr.op, [self.expression(a) for a in expr.args], expr.attrs, expr.ty_args)
        return expr

    def bound(self, expr: relax.Expr) -> Any:
        """What a variable of the old program is bound to; None for anything else."""
        return self.definition.get(expr) if isinstance(expr, relax.Var) else None

    def constant(self, expr: relax.Expr) -> GenericConst | None:
        """The constant that ``expr`` is or is bound to."""
        value = self.definition.get(expr, expr) if isinstance(expr, relax.Var) else expr
        return value if isinstance(value, GenericConst) else None

    def body(self) -> None:
        """Emit all bindings."""
        for block in self.main.body.blocks:
            for binding in block.bindings:
                self.binding(binding.var, binding.value)

    def _output(self, result: relax.Expr) -> relax.Var:
        """The block's output; of one tensor it keeps the name, which is its layer's."""
        if not isinstance(result, relax.DataflowVar):
            return self.builder.emit_output(result)
        output = relax.Var(result.name, result.ty)
        self.builder.emit_normalized(relax.VarBinding(output, result))
        return output

    def rewrite(self) -> tvm.IRModule:
        """The new module: the rewritten ``main`` and the other functions as they were."""
        parameters = [self.parameter(old) for old in self.main.params]
        self.variables.update(zip(self.main.params, parameters, strict=True))
        for name, function in self.mod.functions_items():
            if name.name_hint != "main":
                self.variables[name] = self.builder.add_func(function, name.name_hint)
        with self.builder.function("main", parameters, attrs={"num_input": len(parameters)}):
            with self.builder.dataflow():
                self.body()
                output = self._output(self.expression(self.main.body.body))
            self.builder.emit_func_output(output)
        return self.builder.get()
