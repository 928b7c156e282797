"""Shifts nonlinear layers with a small negative dip above zero, for layouts without a sign.

GELU, SiLU and their like never fall below a small negative number. A constant added to what they give makes it
nonnegative, and the linear layer that reads it takes the constant's share off its bias. Unsigned layouts have one bit
more for it. Before::

    lv = R.nn.gelu(x)
    lv1 = R.matmul(lv, weight)
    lv2 = R.add(lv1, bias)

After::

    lv = R.nn.gelu(x)
    lv_lifted = R.add(lv, R.const(0.1875))
    lv1 = R.matmul(lv_lifted, weight)
    lv2 = R.add(lv1, bias - 0.1875 * weight.sum(axis=0))

Only where nothing else reads the function, and no convolution pads it with zeros. Not where dense layers alone read it
and can rotate its rows (``row_scales``), which lose less in linear layouts then than shifted ones: a rotation makes one
large value of a constant. Rounding the weights makes the constant's share another one, by the same number for every
value of a channel: the bias correction takes that off, so this is for calibrated networks. ``FoldBatchnorm`` joins the
biases afterwards.
"""

from __future__ import annotations

import math

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.calibration.linear import LINEAR
from tvm_qfp8.relay_passes.fold_batchnorm import FoldBatchnorm
from tvm_qfp8.relay_passes.fuse import op_name, shape_of
from tvm_qfp8.relay_passes.interpolate import called_function
from tvm_qfp8.relay_passes.rewriter import MainRewriter
from tvm_qfp8.tables.families import find_function
from tvm_qfp8.topi.rotation import largest_order

DEEPEST = 0.5
"""A function that falls further below zero gains less from an unsigned layout."""

MARGIN = 2.0**-8
"""Below a function's least value, for the error of its table."""

STEPS = 32
"""Shifts are multiples of 1 / STEPS: exact, with few bits."""

_ARGUMENTS = np.linspace(-20.0, 20.0, 40001)


def lift_above_zero(mod: tvm.IRModule) -> tvm.IRModule:
    """``mod``, in canonical form, with shifted nonlinear layers."""
    return tvm.transform.Sequential([LiftAboveZero(), FoldBatchnorm()])(mod)


@tvm.transform.module_pass(opt_level=0, name="LiftAboveZero")
class LiftAboveZero:
    """Rewrite ``main``."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return _Rewriter(mod).rewrite()


class _Rewriter(MainRewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.lifted: dict[relax.Var, relax.Expr] = {}
        self.shift: dict[relax.Var, float] = {}

    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        if op_name(value) in LINEAR and value.args[0] in self.lifted:
            self._take_off(var, value)
            return
        self.keep(var, value)
        dip = _dip(value)
        if dip and self._only_unpadded_linears_read(var) and not self._rows_can_be_rotated(var):
            self.shift[var] = math.ceil((dip + MARGIN) * STEPS) / STEPS
            lifted = relax.op.add(self.variables[var], relax.const(np.float32(self.shift[var])))
            self.lifted[var] = self.builder.emit(lifted, f"{var.name}_lifted")

    def _only_unpadded_linears_read(self, var: relax.Var) -> bool:
        readers = self.readers[var]
        return self.uses.get(var) == len(readers) and all(
            _is_unpadded_linear(self.definition[reader], var) for reader in readers
        )

    def _rows_can_be_rotated(self, var: relax.Var) -> bool:
        only_dense = all(op_name(self.definition[reader]) == "relax.matmul" for reader in self.readers[var])
        return only_dense and largest_order(shape_of(var)[-1]) > 1

    def _take_off(self, var: relax.Var, value: relax.Call) -> None:
        weight, source = value.args[1].value.numpy(), value.args[0]
        axis = 1 if op_name(value) == "relax.matmul" else str(value.attrs.kernel_layout).index("O")
        share = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).sum(1, dtype=np.float64)
        call = relax.Call(value.op, [self.lifted[source], value.args[1]], value.attrs, value.ty_args)
        result = self.builder.emit(call, var.name)
        bias = relax.const((-self.shift[source] * share).astype(np.float32))
        self.variables[var] = self.builder.emit(relax.op.add(result, bias), f"{var.name}_shifted")


def _dip(value: relax.Expr) -> float:
    """How far a nonlinear function falls below zero, 0 where it does not or falls too far."""
    name = called_function(value)
    if name is None:
        return 0.0
    with np.errstate(all="ignore"):  # a logarithm has no value at some
        least = float(np.min(find_function(name).reference(_ARGUMENTS)))
    return -least if -DEEPEST <= least < 0 else 0.0


def _is_unpadded_linear(call: relax.Expr, data: relax.Var) -> bool:
    if op_name(call) not in ("relax.matmul", "relax.nn.conv2d") or not isinstance(call.args[1], GenericConst):
        return False
    if not call.args[0].same_as(data):
        return False
    if op_name(call) == "relax.matmul":
        return len(call.args[1].ty.shape) == 2
    return not any(int(p) for p in call.attrs.padding)
