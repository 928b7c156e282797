"""Codes of what quantized layers read: each made once, and moved instead of the floats that they stand for.

An encode goes up through operators that only move data or repeat it, so that they move bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_qfp8.calibration.plan import ActivationQuantization, QuantizationPlan
from tvm_qfp8.data_movement import KEEPS_ELEMENTS
from tvm_qfp8.format import get_layout
from tvm_qfp8.layer_names import layer_name
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter


def _pads_codes(value: Any) -> bool:
    """Padding with zeros, whose code is 0, or with what the tensor itself holds."""
    if op_name(value) != "relax.nn.pad":
        return False
    return str(value.attrs.pad_mode) != "constant" or float(value.attrs.pad_value) == 0.0


def _repeats_pixels(value: Any) -> bool:
    return op_name(value) == "relax.image.resize2d" and str(value.attrs.method) == "nearest_neighbor"


class EncodingRewriter(MainRewriter):
    """A rewriter that knows which codes it has made."""

    def __init__(self, mod: tvm.IRModule, plan: QuantizationPlan) -> None:
        super().__init__(mod)
        self.plan = plan
        self._encoded: dict[tuple, Any] = {}

    def operand(
        self, expr: relax.Expr, activation: ActivationQuantization
    ) -> tuple[relax.Expr, np.float32, relax.Expr | None]:
        """Codes, their scale, and the scales that are found at run time."""
        if activation.scale is None:
            codes, scales = self.encode_at_run_time(expr, activation)
            return codes, np.float32(1), scales
        return self.encode(expr, activation.layout, activation.scale), np.float32(activation.scale), None

    def encode_at_run_time(
        self, expr: relax.Expr, activation: ActivationQuantization
    ) -> tuple[relax.Expr, relax.Expr]:
        """Codes and the scale of each row or sample; layers that read one tensor by row have the same factors."""
        key = (expr, activation.layout, "rows" if activation.by_rows else "samples")
        if key not in self._encoded and activation.by_samples and self._keeps_samples(expr):
            value: Any = self.definition[expr]
            codes, scales = self.encode_at_run_time(value.args[0], activation)
            moved = relax.Call(value.op, [codes, *map(self.expression, value.args[1:])], value.attrs)
            self._encoded[key] = [self.builder.emit(moved, f"{expr.name}_samples"), scales]
        if key not in self._encoded:
            x, layout = self.expression(expr), get_layout(activation.layout)
            if activation.by_rows:
                ones = np.ones(shape_of(expr)[-1], np.float32)
                factors = ones if activation.factors is None else activation.factors
                call = qfp8_ops.encode_rows(x, relax.const(factors), layout, activation.rotation)
            else:
                call = qfp8_ops.encode_samples(x, layout)
            both = self.builder.emit(call, f"{getattr(expr, 'name', 'constant')}_{key[-1]}")
            self._encoded[key] = [self.builder.emit(relax.TupleGetItem(both, part)) for part in range(2)]
        codes, scales = self._encoded[key]
        return codes, scales

    def _keeps_samples(self, expr: relax.Expr) -> bool:
        """Whether this only moves elements within the samples of what it reads, so that bytes may be moved instead."""
        value = self.bound(expr)
        pads = _pads_codes(value) and min(map(int, value.attrs.pad_width)) >= 0
        if not pads and op_name(value) not in ("relax.reshape", "relax.permute_dims"):
            return False
        source = value.args[0]
        if not isinstance(source, relax.Var) or not static_shape(source):
            return False
        if op_name(value) == "relax.permute_dims":
            return value.attrs.axes is not None and int(value.attrs.axes[0]) == 0
        return shape_of(source)[0] == shape_of(value)[0]

    def _is_read_as_codes(self, var: Any) -> bool:
        """Whether one thing reads it, or only layers, which all have the same codes of it."""

        def takes_codes(reader: relax.Var) -> bool:
            chosen = self.plan.linear.get(layer_name(reader))
            return chosen is not None and chosen.activation is not None and chosen.activation.has_one_scale

        readers = self.readers[var]
        return self.uses[var] == 1 or self.uses[var] == len(readers) and all(map(takes_codes, readers))

    def _is_taken_often(self, value: Any) -> bool:
        """Places along an axis of what is read several times, as the frames that a 3-D convolution joins."""
        taken = op_name(value) == "relax.take" and value.attrs.axis is not None
        return taken and isinstance(value.args[0], relax.Var) and self.uses[value.args[0]] > 1

    def encode_channels(self, expr: relax.Expr, activation: ActivationQuantization) -> relax.Expr:
        """Codes with a scale for each channel: factors are powers of two, so that one multiplication does for both."""
        assert activation.scale is not None and activation.factors is not None
        key = (expr, activation.layout, "channels")
        if key not in self._encoded:
            reciprocals = activation.factors * (np.float32(1) / np.float32(activation.scale))
            layout, constant = get_layout(activation.layout), relax.const(reciprocals.astype(np.float32))
            call = qfp8_ops.encode(self.expression(expr), layout, activation.scale, constant)
            self._encoded[key] = self.builder.emit(call, f"{getattr(expr, 'name', 'constant')}_codes")
        return self._encoded[key]

    def encode(self, expr: relax.Expr, layout: str, scale: float) -> relax.Expr:
        key = (expr, layout, scale)
        if key not in self._encoded:
            value = self.bound(expr)
            if op_name(value) == "relax.concat" and self._is_read_as_codes(expr):
                # Codes are joined instead: the encodes fuse with what makes the parts.
                parts = [self.encode(part, layout, scale) for part in value.args[0].fields]
                moved = relax.Call(value.op, [relax.Tuple(parts)], value.attrs)
            elif (
                op_name(value) in KEEPS_ELEMENTS
                or _pads_codes(value)
                or self._is_taken_often(value)
                or _repeats_pixels(value)
                and self._is_read_as_codes(expr)
            ):
                source = self.encode(value.args[0], layout, scale)
                moved = relax.Call(value.op, [source, *map(self.expression, value.args[1:])], value.attrs)
            else:
                moved = qfp8_ops.encode(self.expression(expr), get_layout(layout), scale)
            self._encoded[key] = self.builder.emit(moved, f"{getattr(expr, 'name', 'constant')}_codes")
        return self._encoded[key]
