"""Gives each part of a dense layer's result a layer of its own.

Attention blocks compute queries, keys and values by one product and take it apart, as gated layers do with their two
halves. Before::

    lv = R.add(R.matmul(x, w), b)                       # (1, 197, 576)
    lv1 = R.reshape(lv, (1, 197, 3, 3, 64))
    lv2 = R.permute_dims(lv1, [2, 0, 3, 1, 4])          # (3, 1, 3, 197, 64)
    lv3 = R.take(lv2, 0, axis=0)                        # and 1 and 2

After, for each of the three::

    lv = R.add(R.matmul(x, w[:, :192]), b[:192])
    lv1 = R.reshape(lv, (1, 197, 3, 64))
    lv3 = R.permute_dims(lv1, [0, 2, 1, 3])

So nothing is copied, and each part has a layout and a scale of its own, and is encoded where it is computed. Splits
and slices of the result itself, without a reshape, are taken apart likewise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter

FEWEST_COLUMNS = 16
"""Of a part: narrower ones fill no vector."""


@tvm.transform.module_pass(opt_level=0, name="SplitDense")
class SplitDense:
    """Rewrite ``main``; what is not read any more is removed."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


@dataclass
class _View:
    """How the result is seen where it is taken apart, along ``axis``: itself, reshaped, or that and permuted."""

    var: relax.Var
    axis: int
    reshape: tuple[int, ...] = ()
    parts_axis: int = 0
    """Where the parts are in ``reshape``."""
    permute: tuple[int, ...] = ()

    def of(self, part: int, columns: int) -> tuple[list[int], list[int]]:
        """The shape and the axes, if any, of ``part`` of the columns; an axis of one place is left out."""
        shape, axes = [*self.reshape], [*self.permute]
        if not shape:
            return [], []
        shape[self.parts_axis] = shape[self.parts_axis] * part // columns
        if shape[self.parts_axis] == 1:
            del shape[self.parts_axis]
            axes = [axis - (axis > self.parts_axis) for axis in axes if axis != self.parts_axis]
        return shape, axes


@dataclass
class _Part:
    """Some columns of a dense layer."""

    dense: relax.Var
    bias: relax.Var | None
    first: int
    last: int
    """The column behind the last one."""
    index: int
    view: _View


class _Rewriter(MainRewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.parts: dict[relax.Var, _Part] = {}
        for var, value in self.definition.items():
            if op_name(value) == "relax.matmul" and self._has_matrix(value):
                self._note(var)

    def _has_matrix(self, value: relax.Call) -> bool:
        weight = self.constant(value.args[1])
        return weight is not None and len(shape_of(weight)) == 2 and static_shape(value.args[0]) is not None

    def _note(self, dense: relax.Var) -> None:
        result, bias = dense, None
        columns = shape_of(dense)[-1]
        readers = self.readers[dense]
        if len(readers) == 1 and self._adds_bias(readers[0], columns):
            result = bias = readers[0]
        if not all(self._read_by_bindings(var) for var in (dense, result)):
            return
        parts = []
        for view in self._views(result, columns):
            ranges = self._ranges(view, columns)
            if ranges is None:
                return
            parts += [(leaf, first, last, view) for leaf, first, last in ranges]
        widths = [last - first for _, first, last, _ in parts]
        if len(parts) < 2 or min(widths) < FEWEST_COLUMNS or sum(widths) > columns:
            return
        for index, (leaf, first, last, view) in enumerate(parts):
            self.parts[leaf] = _Part(dense, bias, first, last, index, view)

    def _read_by_bindings(self, var: relax.Var) -> bool:
        """Once by each of its readers, and no result of the program."""
        return self.uses.get(var) == len(self.readers[var])

    def _adds_bias(self, var: relax.Var, columns: int) -> bool:
        value: Any = self.definition[var]
        constants = [self.constant(a) for a in value.args] if op_name(value) == "relax.add" else []
        shapes = [shape_of(c) for c in constants if c is not None]
        return len(shapes) == 1 and (math.prod(shapes[0]),) == (columns,) == shapes[0][-1:]

    def _views(self, result: relax.Var, columns: int) -> list[_View]:
        """All that reads the result: reshapes whose parts are along one axis, or the result as it is."""
        readers = self.readers[result]
        found = [self._reshaped(reader, columns) for reader in readers]
        views = [view for view in found if view is not None]
        return views if views and len(views) == len(readers) else [_View(result, len(shape_of(result)) - 1)]

    def _reshaped(self, var: relax.Var, columns: int) -> _View | None:
        if op_name(self.definition[var]) != "relax.reshape":
            return None
        shape = static_shape(var) or ()
        starts = [axis for axis in range(len(shape)) if math.prod(shape[axis:]) == columns]
        if not starts:
            return None
        start = starts[-1]  # of several, all but the last have one element
        readers = self.readers[var]
        alone = len(readers) == 1 and self._read_by_bindings(var)
        turned: Any = self.definition[readers[0]] if alone else None
        if op_name(turned) != "relax.permute_dims" or turned.attrs.axes is None:
            return _View(var, start, shape, start)
        axes = tuple(int(axis) % len(shape) for axis in turned.attrs.axes)
        return _View(readers[0], axes.index(start), shape, start, axes)

    def _ranges(self, view: _View, columns: int) -> list[tuple[relax.Var, int, int]] | None:
        """Columns ``[first, last)`` of what is taken from a view; None where it is read otherwise."""
        extent = shape_of(view.var)[view.axis]
        step = columns // extent
        found = []
        for reader in self.readers[view.var]:
            value: Any = self.definition[reader]
            if op_name(value) == "relax.split":
                taken = self._of_split(reader, value, view.axis, extent)
            else:
                one = self._slice(value, view.axis, extent)
                taken = None if one is None else [(reader, *one)]
            if taken is None:
                return None
            found += taken
        if not self._read_by_bindings(view.var):
            return None
        return [(leaf, first * step, last * step) for leaf, first, last in found]

    def _of_split(
        self, var: relax.Var, value: relax.Call, axis: int, extent: int
    ) -> list[tuple[relax.Var, int, int]] | None:
        if int(value.attrs.axis) % len(shape_of(value.args[0])) != axis:
            return None
        given = value.attrs.indices_or_sections
        if hasattr(given, "value"):
            ends = [extent * (part + 1) // int(given) for part in range(int(given))]
        else:
            ends = [*map(int, given), extent]
        bounds = [*zip([0, *ends], ends, strict=False)]
        found = []
        for reader in self.readers[var]:
            item = self.definition[reader]
            if not isinstance(item, relax.TupleGetItem):
                return None
            found.append((reader, *bounds[item.index]))
        return found

    def _slice(self, value: Any, axis: int, extent: int) -> tuple[int, int] | None:
        """Of a slice, or of one place, along ``axis`` alone."""
        if op_name(value) == "relax.take" and isinstance(value.args[1], GenericConst):
            place = value.args[1].value.numpy()
            same_axis = (
                value.attrs.axis is not None and int(value.attrs.axis) % len(shape_of(value.args[0])) == axis
            )
            if not same_axis or place.ndim:
                return None
            first = int(place) % extent
            return first, first + 1
        if op_name(value) != "relax.strided_slice":
            return None
        axes, begin, end, *strides = ([int(v.value) for v in argument.fields] for argument in value.args[1:])
        if axes not in ([axis], [axis - len(shape_of(value.args[0]))]) or (strides and strides[0] != [1]):
            return None
        first, last = (
            min(extent, max(0, place + extent if place < 0 else place)) for place in (begin[0], end[0])
        )
        return first, last

    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        part = self.parts.get(var)
        if part is None:
            self.keep(var, value)
            return
        dense: Any = self.definition[part.dense]
        columns = slice(part.first, part.last)
        weight: Any = self.constant(dense.args[1])
        name = f"{part.dense.name}_{part.index}"
        own = relax.const(np.ascontiguousarray(weight.value.numpy()[:, columns]))
        result = self.builder.emit(
            relax.Call(dense.op, [self.expression(dense.args[0]), own], dense.attrs), name
        )
        if part.bias is not None:
            bias = next(filter(None, map(self.constant, self.definition[part.bias].args)))
            values = relax.const(np.ascontiguousarray(bias.value.numpy()[..., columns]))
            result = self.builder.emit(relax.op.add(result, values), f"{name}_out")
        shape, axes = part.view.of(part.last - part.first, shape_of(part.dense)[-1])
        if shape:
            result = self.builder.emit(relax.op.reshape(result, shape))
        if axes:
            result = self.builder.emit(relax.op.permute_dims(result, axes))
        if static_shape(result) != static_shape(var):
            result = self.builder.emit(relax.op.reshape(result, shape_of(var)))
        self.variables[var] = result
