"""Convolutions of the same input whose results are added become one.

Runs after BatchNorm is folded. Before, as RepVGG, MobileOne and FastViT are trained::

    lv = R.nn.conv2d(x, w3, padding=[1, 1, 1, 1])
    lv1 = R.add(lv, b3)
    lv2 = R.nn.conv2d(x, w1)
    lv3 = R.add(lv2, b1)
    lv4 = R.add(lv1, lv3)

After::

    lv = R.nn.conv2d(x, w3 + padded(w1), padding=[1, 1, 1, 1])
    lv4 = R.add(lv, b3 + b1)

Kernels join the largest among them, which has to cover them all, so that the products become fewer. What else is
added stays: a BatchNorm of the input itself could be one more kernel, with large weights in its middle, but then the
input would be rounded where it passes in float32 now, which costs RepVGG much of its accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter


@tvm.transform.module_pass(opt_level=0, name="JoinBranches")
class JoinBranches:
    """Rewrite ``main``; convolutions that are not read any more are removed."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


@dataclass
class _Sum:
    """What a chain of additions adds up."""

    convolutions: list[relax.Var]
    shift: np.ndarray
    rest: list[relax.Var]


class _Rewriter(MainRewriter):
    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        shape = static_shape(var)
        joined = None
        if op_name(value) == "relax.add" and shape and len(shape) == 4 and str(var.ty.dtype) == "float32":
            terms = _Sum([], np.zeros(shape[-1]), [])
            self._collect(var, terms, True)
            joined = self._joined(terms)
        if joined is None:
            self.keep(var, value)
        else:
            self.variables[var] = joined

    def _collect(self, var: relax.Var, terms: _Sum, first: bool = False) -> None:
        value: Any = self.definition.get(var)
        alone = first or self.uses.get(var) == 1
        if alone and op_name(value) == "relax.add":
            tensors = [a for a in value.args if self._per_channel(a, var) is None]
            if all(isinstance(t, relax.Var) and static_shape(t) == static_shape(var) for t in tensors):
                for argument in value.args:
                    constant = self._per_channel(argument, var)
                    if constant is None:
                        self._collect(argument, terms)
                    else:
                        terms.shift = terms.shift + constant
                return
        if alone and _is_convolution(value) and self.constant(value.args[1]) is not None:
            terms.convolutions.append(var)
            return
        terms.rest.append(var)

    def _per_channel(self, expr: relax.Expr, var: relax.Var) -> np.ndarray | None:
        constant, channels = self.constant(expr), shape_of(var)[-1]
        if constant is None:
            return None
        array = constant.value.numpy().astype(np.float64)
        if array.size != 1 and not array.size == array.shape[-1] == channels:
            return None
        return np.broadcast_to(array.reshape(-1), channels)

    def _joined(self, terms: _Sum) -> relax.Expr | None:
        """The sum with one convolution where several of it fit together; None where none do."""
        if not terms.convolutions:
            return None
        largest = max(terms.convolutions, key=lambda v: np.prod(shape_of(self.definition[v].args[1])))
        value = self.definition[largest]
        weight = self._weight(value)
        rest, count = list(terms.rest), 0
        for convolution in terms.convolutions:
            if convolution.same_as(largest):
                continue
            added = self._in_window(self.definition[convolution], value)
            if added is None:
                rest.append(convolution)
            else:
                weight, count = weight + added, count + 1
        if not count:
            return None
        emit = self.builder.emit
        call = relax.Call(
            value.op,
            [self.expression(value.args[0]), relax.const(weight.astype(np.float32))],
            value.attrs,
            value.ty_args,
        )
        result = emit(call, f"{largest.name}_joined")
        if terms.shift.any():
            result = emit(relax.op.add(result, relax.const(terms.shift.astype(np.float32))))
        for other in rest:
            result = emit(relax.op.add(result, self.expression(other)))
        return result

    def _weight(self, convolution: relax.Call) -> np.ndarray:
        constant = self.constant(convolution.args[1])
        assert constant is not None
        return constant.value.numpy().astype(np.float64)

    def _in_window(self, value: relax.Call, large: relax.Call) -> np.ndarray | None:
        """The weights of ``value`` in the window of ``large``; None where they do not fit there."""
        same = value.args[0].same_as(large.args[0]) and all(
            _numbers(value.attrs, name) == _numbers(large.attrs, name) for name in ("strides", "dilation")
        )
        if not same or int(value.attrs.groups) != int(large.attrs.groups):
            return None
        weight = self._weight(value)
        height, width = shape_of(large.args[1])[1:3]
        dilation = _numbers(value.attrs, "dilation")
        before = [
            a - b
            for a, b in zip(_numbers(large.attrs, "padding"), _numbers(value.attrs, "padding"), strict=True)
        ][:2]
        if any(b % d for b, d in zip(before, dilation, strict=True)):
            return None
        top, left = (b // d for b, d in zip(before, dilation, strict=True))
        bottom, right = height - top - weight.shape[1], width - left - weight.shape[2]
        if min(top, left, bottom, right) < 0:
            return None
        return np.pad(weight, [(0, 0), (top, bottom), (left, right), (0, 0)])


def _is_convolution(value: Any) -> bool:
    return op_name(value) == "relax.nn.conv2d" and (
        str(value.attrs.data_layout),
        str(value.attrs.kernel_layout),
    ) == ("NHWC", "OHWI")


def _numbers(attrs, name: str) -> list[int]:
    return [int(number) for number in getattr(attrs, name)]
