"""BatchNorm layers of an imported program: found, marked for calibration, given other statistics.

``MarkBatchnorms`` runs before ``prepare``, on a copy of the program that only calibration sees. Before::

    lv1 = R.nn.batch_norm(lv, gamma, beta, mean, variance)

After::

    lv2 = R.qfp8.batchnorm_input(lv, 0, 1)       # layer 0, channels on axis 1
    lv1 = R.nn.batch_norm(lv2, gamma, beta, mean, variance)

The mark passes its input on. It keeps what the layer receives visible in canonical form, where BatchNorm itself is
arithmetic that folding would move into the weights before it. Layers whose statistics are computed are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.fuse import op_name
from tvm_qfp8.relay_passes.rewriter import MainRewriter

BATCHNORM = "relax.nn.batch_norm"
MEAN, VARIANCE = 3, 4  # arguments of batch_norm


@dataclass(frozen=True)
class BatchnormStatistics:
    """What a BatchNorm layer normalizes by: float64 ``(channels,)`` each, and what is added to the variance."""

    mean: np.ndarray
    variance: np.ndarray
    epsilon: float


def find_batchnorms(mod: tvm.IRModule) -> list[BatchnormStatistics]:
    """The statistics of all BatchNorm layers with constant ones, in binding order: the numbers of ``MarkBatchnorms``."""
    rewriter = _Numbered(mod)
    found = []
    for value in rewriter.layers():
        mean, variance = (rewriter.constant(value.args[i]).value.numpy() for i in (MEAN, VARIANCE))
        found.append(
            BatchnormStatistics(
                mean.astype(np.float64), variance.astype(np.float64), float(value.attrs.epsilon)
            )
        )
    return found


class _Numbered(MainRewriter):
    def is_layer(self, value: relax.Expr) -> bool:
        if op_name(value) != BATCHNORM:
            return False
        return all(self.constant(value.args[i]) is not None for i in (MEAN, VARIANCE))

    def layers(self) -> list[relax.Call]:
        return [value for value in self.definition.values() if self.is_layer(value)]


@tvm.transform.module_pass(opt_level=0, name="MarkBatchnorms")
class MarkBatchnorms:
    """Rewrite ``main``."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
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
        mark = qfp8_ops.batchnorm_input(call.args[0], self.marked, int(value.attrs.axis))
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
