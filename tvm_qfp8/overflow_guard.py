"""Keeps the activation of a layer in float32 where its int32 sums could overflow (see ``topi.overflow``)."""

from __future__ import annotations

from dataclasses import replace

from tvm_qfp8.calibration.plan import QuantizationPlan
from tvm_qfp8.topi.overflow import INT32_LIMIT, largest_sum


def keep_sums_in_int32(plan: QuantizationPlan) -> None:
    """Change ``plan`` in place: layers over the bound quantize only their weights, and say so."""
    for name, linear in plan.linear.items():
        if linear.activation is None:
            continue
        weight = linear.weight
        axis = weight.axis if weight.axis is not None else 0
        if largest_sum(weight.codes, axis, weight.layout, linear.activation.layout) >= INT32_LIMIT:
            note = "sums could overflow int32: the activation stays float32"
            plan.linear[name] = replace(linear, activation=None, note=note)
