"""Replaces nonlinear operators by tables: ``R.nn.gelu(x)`` -> ``R.qfp8.interpolate(x, "gelu", max_error)``.

Runs after quantization, before grouping. Operators that IEEE arithmetic fixes to the bit (ReLU, clip, sqrt,
division) stay; softmax and LayerNorm become row kernels later, with tables inside.
"""

from __future__ import annotations

import tvm
from tvm import relax, tirx
from tvm.ir import GenericConst

from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.tables.operators import function_of


def called_function(call: relax.Expr) -> str | None:
    """The name of the tabulated function that a call computes, None for any other expression."""
    if not op_name(call):
        return None
    return function_of(op_name(call), tuple(_number(argument) for argument in call.args))


def _number(argument: relax.Expr):
    if isinstance(argument, GenericConst):
        # Weights are neither exponents nor slopes; a QFP8 constant has no NumPy type either.
        single = str(argument.ty.dtype) == "float32" and all(extent == 1 for extent in shape_of(argument))
        return argument.value.numpy() if single else None
    return float(argument.value) if isinstance(argument, tirx.FloatImm | tirx.IntImm) else None


@tvm.transform.module_pass(opt_level=0, name="Interpolate")
class Interpolate:
    """Turn every float32 nonlinear operator with a table into an interpolation."""

    def __init__(self, max_error: float) -> None:
        self.max_error = max_error

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        max_error = self.max_error

        @relax.expr_functor.mutator
        class Rewrite(relax.PyExprMutator):
            def visit_call_(self, call):
                call = self.visit_expr_post_order(call)
                function = called_function(call)
                if function is None or str(call.args[0].ty.dtype) != "float32" or static_shape(call) is None:
                    return call
                return qfp8_ops.interpolate(call.args[0], function, max_error)

        rewrite = Rewrite(mod)
        function = rewrite.visit_expr(mod["main"])
        rewrite.builder_.update_func(mod.get_global_var("main"), function)
        return rewrite.builder_.get()
