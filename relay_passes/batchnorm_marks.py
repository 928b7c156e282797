"""BatchNorm layers of an imported program: found, marked for calibration, given other statistics.

``mark_batchnorms`` is called before ``prepare``, for a program that only calibration sees. Before::

    lv1 = R.nn.batch_norm(lv, gamma, beta, mean, variance)

After::

    lv2 = R.qfp8.batchnorm_input(lv, 0, 1)       # layer 0, channels on axis 1
    lv1 = R.nn.batch_norm(lv2, gamma, beta, mean, variance)

The mark passes its input on. It keeps what the layer receives visible in canonical form, where BatchNorm itself is
arithmetic that folding would move into the weights before it. Layers whose statistics are computed are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tvm
from tvm import relax

from tvm_qfp8.calibration.batchnorm import BatchnormStatistics
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.fuse import op_name, shape_of
from tvm_qfp8.relay_passes.rewriter import MainRewriter

BATCHNORM = "relax.nn.batch_norm"
MEAN, VARIANCE = 3, 4  # arguments of batch_norm


def find_batchnorms(mod: tvm.IRModule) -> list[BatchnormStatistics]:
    """Of all BatchNorm layers with constant statistics, in binding order: the numbers of ``mark_batchnorms``."""
    rewriter = _Numbered(mod)
    return [rewriter.statistics(call) for call in rewriter.layers()]


class _Numbered(MainRewriter):
    def is_layer(self, value: relax.Expr) -> bool:
        if op_name(value) != BATCHNORM:
            return False
        return all(self.constant(value.args[i]) is not None for i in (MEAN, VARIANCE))

    def statistics(self, call: relax.Call) -> BatchnormStatistics:
        mean, variance = (self._array(call.args[i]) for i in (MEAN, VARIANCE))
        return BatchnormStatistics(mean, variance, float(call.attrs.epsilon))

    def _array(self, expr: relax.Expr) -> np.ndarray:
        constant = self.constant(expr)
        assert constant is not None, "layers have constant statistics"
        return constant.value.numpy().astype(np.float64)

    def layers(self) -> list[relax.Call]:
        return [value for value in self.definition.values() if self.is_layer(value)]


def mark_batchnorms(mod: tvm.IRModule) -> tvm.IRModule:
    """The program with a mark before each layer of ``find_batchnorms``."""
    return _Mark(mod).rewrite()


class _Mark(_Numbered):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.marked = 0

    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        if not self.is_layer(value):
            self.keep(var, value)
            return
        call = self.expression(value)
        axis = int(value.attrs.axis) % len(shape_of(value.args[0]))
        mark = qfp8_ops.batchnorm_input(call.args[0], self.marked, axis)
        source = self.builder.emit(mark, f"{var.name}_input")
        self.variables[var] = self.builder.emit(
            relax.Call(call.op, [source, *call.args[1:]], call.attrs, call.ty_args), var.name
        )
        self.marked += 1


def with_statistics(mod: tvm.IRModule, found: Mapping[int, BatchnormStatistics]) -> tvm.IRModule:
    """The program with the statistics of ``found``, by layer number; other layers keep theirs."""
    return _Replace(mod, found).rewrite()


class _Replace(_Numbered):
    def __init__(self, mod: tvm.IRModule, found: Mapping[int, BatchnormStatistics]) -> None:
        super().__init__(mod)
        self.found, self.passed = found, 0

    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        if not self.is_layer(value):
            self.keep(var, value)
            return
        chosen = self.found.get(self.passed)
        self.passed += 1
        if chosen is None:
            self.keep(var, value)
            return
        call = self.expression(value)
        arguments = list(call.args)
        for i, array in ((MEAN, chosen.mean), (VARIANCE, chosen.variance)):
            arguments[i] = relax.const(array.astype(np.float32))
        self.variables[var] = self.builder.emit(
            relax.Call(call.op, arguments, call.attrs, call.ty_args), var.name
        )
