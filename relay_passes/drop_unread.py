"""Computes of dense layers and products only what is read of them later.

Classifiers read one token of their last block, and tables of relative positions are multiplied whole though a product
of few tokens reads a part. Before::

    lv = R.add(R.matmul(x, w), residual)                # (1, 128, 768)
    lv1 = R.nn.layer_norm(lv, gamma, beta)
    lv2 = R.take(lv1, 0, axis=1)                        # (1, 768)

After::

    lv = R.add(R.matmul(x[:, :1], w), residual[:, :1])  # (1, 1, 768)
    lv1 = R.nn.layer_norm(lv, gamma, beta)
    lv2 = R.reshape(lv1, (1, 768))

Queries are computed for what is left then; keys and values are read by all. Of a table ``w`` that
``gather_elements`` reads products with, the columns that no index names go.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.relay_passes.fuse import op_name, results_of, shape_of, static_shape
from tvm_qfp8.relay_passes.places_read import Places, all_places, no_places, operands, read_by, taken
from tvm_qfp8.relay_passes.rewriter import MainRewriter
from tvm_qfp8.relay_passes.simplify_views import VIEWS

MOST_LEFT = 0.5
"""Of an axis: to select more than that costs about what it saves."""


@tvm.transform.module_pass(opt_level=0, name="DropUnread")
class DropUnread:
    """Rewrite ``main``; what is not read any more is removed."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


class _Rewriter(MainRewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.whole = {*results_of(self.main), *self.main.params}
        """What is computed whole whoever reads it."""
        self.kept = self._places_read()
        while useless := set(self._narrow()) - self._reached_by_products():
            self.whole |= useless
            self.kept = self._places_read()

    def _places_read(self) -> dict[relax.Var, Places]:
        """The places that are computed of each tensor of static shape."""
        tensors = [var for var in (*self.main.params, *self.definition) if static_shape(var) is not None]
        kept = {var: all_places(var) if var in self.whole else no_places(var) for var in tensors}
        for var, value in reversed(self.definition.items()):
            read = None
            if var in kept and isinstance(value, relax.Call):
                kept[var] = [mask if _is_few(mask) else np.ones_like(mask) for mask in kept[var]]
                read = read_by(value, kept[var])
            if read is None:
                wholly = [x for x in (var, *relax.analysis.free_vars(value)) if x in kept]
                kept |= {x: all_places(x) for x in wholly}
                continue
            for source, places in zip(operands(value), read, strict=True):
                if places is not None and source in kept:
                    kept[source] = [old | new for old, new in zip(kept[source], places, strict=True)]
        return kept

    def _narrow(self) -> list[relax.Var]:
        """What is not computed whole."""
        return [var for var in self.definition if not _complete(self.kept.get(var, []))]

    def _reached_by_products(self) -> set[relax.Var]:
        """Products that are not computed whole, and what is made of them and is not computed whole either."""
        reached: set[relax.Var] = set()
        for var in self._narrow():
            value = self.definition[var]
            if op_name(value) == "relax.matmul" or reached.intersection(relax.analysis.free_vars(value)):
                reached.add(var)
        return reached

    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        places = self.kept.get(var)
        read = read_by(value, places) if places is not None and isinstance(value, relax.Call) else None
        if places is None or read is None:
            self.keep(var, value)
            return
        arguments = operands(value)
        if all(_complete(self.kept.get(x, [])) for x in (var, *arguments)):
            self.keep(var, value)
            return
        name, first = op_name(value), read[0] or []
        result = self._part(arguments[0], first)
        if name in ("relax.take", "relax.strided_slice"):
            result = self._taken(value, result, first, places)
        elif name == "relax.gather_elements":
            result = self._gathered(value, result, first, places)
        elif name in VIEWS:
            result = relax.op.reshape(result, [int(mask.sum()) for mask in places])
        else:
            parts = [result, *map(self._part, arguments[1:], read[1:])]
            is_joined = isinstance(value.args[0], relax.Tuple)
            result = relax.Call(
                value.op, [relax.Tuple(parts)] if is_joined else parts, value.attrs, value.ty_args
            )
        self.variables[var] = result if isinstance(result, relax.Var) else self.builder.emit(result, var.name)

    def _part(self, x: relax.Expr, places: Places | None) -> relax.Expr:
        """Some of the places of a constant or of what is kept of a tensor; what has no places as it is."""
        if places is None:
            return self.expression(x)
        if isinstance(x, GenericConst):
            return (
                x
                if _complete(places)
                else relax.const(np.ascontiguousarray(x.value.numpy()[np.ix_(*places)]))
            )
        result = self.expression(x)
        for axis, (kept, wanted) in enumerate(zip(self.kept[x], places, strict=True)):
            result = self._selected(result, axis, _positions(kept)[wanted])
        return result

    def _selected(self, x: relax.Expr, axis: int, indices: np.ndarray) -> relax.Expr:
        """Places of an axis in the order of ``indices``; one index takes the axis away."""
        extent = shape_of(x)[axis]
        if indices.ndim == 1 and np.array_equal(indices, np.arange(extent)):
            return x
        if indices.size == 1 and extent == 1:
            shape = [*shape_of(x)[:axis], *indices.shape, *shape_of(x)[axis + 1 :]]
            return self.builder.emit(relax.op.reshape(x, shape))
        first, end = int(indices.min()), int(indices.max()) + 1
        if indices.ndim == 1 and np.array_equal(indices, np.arange(first, end)):
            return self.builder.emit(relax.op.strided_slice(x, [axis], [first], [end]))
        return self.builder.emit(relax.op.take(x, relax.const(indices, "int64"), axis, mode="wrap"))

    def _taken(self, value: relax.Call, x: relax.Expr, read: Places, places: Places) -> relax.Expr:
        """A selection from ``x``, which holds the places ``read``."""
        selection = taken(value)
        assert selection is not None  # as the rule found it
        axis, indices = selection
        wanted = places[axis : axis + indices.ndim]
        return self._selected(
            x, axis, _positions(read[axis])[indices[np.ix_(*wanted)] if wanted else indices]
        )

    def _gathered(self, value: relax.Call, x: relax.Expr, read: Places, places: Places) -> relax.Expr:
        """The same, of an index for each element."""
        axis = int(value.attrs.axis) % len(places)
        indices = _positions(read[axis])[value.args[1].value.numpy()[np.ix_(*places)]]
        return relax.op.gather_elements(x, relax.const(indices, "int64"), axis)


def _is_few(places: np.ndarray) -> bool:
    return bool(0 < np.count_nonzero(places) <= MOST_LEFT * len(places))


def _complete(places: Places) -> bool:
    return all(mask.all() for mask in places)


def _positions(places: np.ndarray) -> np.ndarray:
    """Where each place of an axis is among those that are kept."""
    return np.cumsum(places) - 1
