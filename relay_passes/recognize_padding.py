"""Puts padding by a tensor's own elements back together, which torch's programs hold as places taken along each axis.

Before::

    lv = R.take(x, [1, 0, 1, 2, 3, 2], axis=3, mode="wrap")         # x (1, 8, 4, 4)
    lv1 = R.take(lv, [1, 0, 1, 2, 3, 2], axis=2, mode="wrap")

After::

    lv1 = R.nn.pad(x, [0, 0, 0, 0, 1, 1, 1, 1], pad_mode="reflect")

Padding along several axes one after the other is one padding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter
from tvm_qfp8.topi.pad import MODES


@tvm.transform.module_pass(opt_level=0, name="RecognizePadding")
class RecognizePadding:
    """Rewrite ``main``; what is not read any more is removed."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


class _Rewriter(MainRewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.padded: dict[relax.Var, tuple[relax.Expr, list[int], str]] = {}
        """What is padded, by how much and how."""

    def replacement(self, var: relax.Var, value: relax.Expr) -> relax.Call | None:
        found = self._taken(value) or _padded(value)
        if found is None:
            return None
        x, widths, mode = found
        inner = self.padded.get(x) if self.uses.get(x) == 1 else None
        if inner is not None and inner[2] == mode and not any(map(min, widths, inner[1])):
            x, widths = inner[0], [a + b for a, b in zip(widths, inner[1], strict=True)]
        self.padded[var] = x, widths, mode
        return relax.op.nn.pad(self.expression(x), widths, pad_mode=mode)

    def _taken(self, value: relax.Expr) -> tuple[relax.Expr, list[int], str] | None:
        """x, widths and mode of places along an axis that go on behind its ends."""
        if op_name(value) != "relax.take" or value.attrs.axis is None or static_shape(value.args[0]) is None:
            return None
        indices: Any = self.constant(value.args[1])
        x, shape = value.args[0], shape_of(value.args[0])
        axis = int(value.attrs.axis) % len(shape)
        places = np.zeros(0) if indices is None else indices.value.numpy()
        middle = np.arange(shape[axis])
        if places.ndim != 1 or len(places) <= len(middle) or not len(middle):
            return None
        for before in np.flatnonzero(places[: len(places) - len(middle) + 1] == 0):
            after = len(places) - len(middle) - int(before)
            for mode, name in MODES.items():
                if np.array_equal(places, np.pad(middle, (int(before), after), name)):
                    widths = [0] * (2 * len(shape))
                    widths[2 * axis : 2 * axis + 2] = int(before), after
                    return x, widths, mode
        return None


def _padded(value: relax.Expr) -> tuple[relax.Expr, list[int], str] | None:
    """The same of padding that is one already."""
    if op_name(value) != "relax.nn.pad" or str(value.attrs.pad_mode) not in MODES:
        return None
    return value.args[0], [int(width) for width in value.attrs.pad_width], str(value.attrs.pad_mode)
