"""Sums of products by subscripts (einsum) become matmuls.

Before, as in the relative attention of XLNet or the layers of Keras's attention::

    lv = R.einsum((q, k), subscripts="ibnd,jbnd->bnij")

After::

    lv1 = R.permute_dims(q, axes=[1, 2, 0, 3])
    lv2 = R.permute_dims(k, axes=[1, 2, 3, 0])
    lv = R.matmul(lv1, lv2)

Labels of both operands and the result are batches; those of both alone are summed over by the matmul, several of them,
or of the rows or columns, as one axis. Labels of one operand alone are summed over before. More than two operands are
multiplied from the left. A label that an operand has twice, a diagonal, stays with what TVM makes of it.
"""

from __future__ import annotations

import math
from collections import Counter

import tvm
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter

ELLIPSIS = "..."


@tvm.transform.module_pass(opt_level=0, name="EinsumProducts")
class EinsumProducts:
    """Rewrite ``main``."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return _Rewriter(mod).rewrite()


def labels_of(subscripts: str, ranks: list[int]) -> tuple[list[str], str]:
    """The labels of each operand and of the result, one character an axis.

    An ellipsis stands for digits, aligned at the last axis, of which Einstein sums have none. Without a result all
    labels that are there once are its, in alphabetical order (NumPy's ``einsum``).
    """
    given, arrow, result = subscripts.replace(" ", "").partition("->")
    operands = given.split(",")
    hidden = [
        rank - len(labels.replace(ELLIPSIS, "")) if ELLIPSIS in labels else 0
        for labels, rank in zip(operands, ranks, strict=True)
    ]
    most = max(hidden)
    digits = "".join(map(chr, range(ord("0"), ord("0") + most)))
    found = [
        labels.replace(ELLIPSIS, digits[most - count :])
        for labels, count in zip(operands, hidden, strict=True)
    ]
    if arrow:
        return found, result.replace(ELLIPSIS, digits)
    counts = Counter("".join(found))
    once = [label for label in counts if counts[label] == 1 and label not in digits]
    return found, digits + "".join(sorted(once))


class _Rewriter(MainRewriter):
    def replacement(self, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if (
            op_name(value) != "relax.einsum"
            or static_shape(value) is None
            or str(value.ty.dtype) != "float32"
        ):
            return None
        operands = list(value.args[0].fields)
        if any(static_shape(x) is None for x in operands):
            return None
        labels, result = labels_of(str(value.attrs.subscripts), [len(shape_of(x)) for x in operands])
        extents: dict[str, int] = {}
        for x, names in zip(operands, labels, strict=True):
            for name, extent in zip(names, shape_of(x), strict=True):
                if extents.setdefault(name, extent) != extent:
                    return None  # an axis of 1 that is repeated
        if any(len(set(names)) < len(names) for names in [*labels, result]):
            return None
        if 0 in shape_of(value):
            return None
        if 0 in extents.values():
            return relax.op.zeros(shape_of(value), "float32")
        self.extents, self.name = extents, var.name
        x, names = self.expression(operands[0]), labels[0]
        for position, (other, found) in enumerate(zip(operands[1:], labels[1:], strict=True), 1):
            kept = "".join([result, *labels[position + 1 :]])
            x, names = self._product(x, names, self.expression(other), found, kept)
        return self._permuted(self._summed(x, names, result), [n for n in names if n in result], result)

    # -- of two operands ----------------------------------------------------------------------------------------

    def _product(
        self, x: relax.Expr, of_x: str, y: relax.Expr, of_y: str, kept: str
    ) -> tuple[relax.Expr, str]:
        """The product with the labels ``kept``, and its labels in order."""
        if isinstance(x, GenericConst):  # dense layers have their constant on the right
            x, of_x, y, of_y = y, of_y, x, of_x
        x, of_x = self._summed(x, of_x, of_y + kept), "".join(n for n in of_x if n in of_y + kept)
        y, of_y = self._summed(y, of_y, of_x + kept), "".join(n for n in of_y if n in of_x + kept)
        batch = "".join(n for n in of_x if n in of_y and n in kept)
        depth = "".join(n for n in of_x if n in of_y and n not in kept)
        rows = "".join(n for n in of_x if n not in of_y)
        columns = "".join(n for n in of_y if n not in of_x)
        names = batch + rows + columns
        if not depth:
            x = self._shaped(self._permuted(x, of_x, batch + rows), [*batch, *rows, *("" for _ in columns)])
            y = self._shaped(
                self._permuted(y, of_y, batch + columns), [*batch, *("" for _ in rows), *columns]
            )
            return self.builder.emit(relax.op.multiply(x, y)), names
        whole = not batch and len(rows) > 0  # a matmul keeps the axes before the last
        x = self._shaped(
            self._permuted(x, of_x, batch + rows + depth), [*batch, *(rows if whole else [rows]), depth]
        )
        y = self._shaped(self._permuted(y, of_y, batch + depth + columns), [*batch, depth, columns])
        product = self.builder.emit(relax.op.matmul(x, y), self.name)
        return self._shaped(product, list(names)), names

    # -- of one -------------------------------------------------------------------------------------------------

    def _summed(self, x: relax.Expr, names: str, kept: str) -> relax.Expr:
        """Without the axes that are not kept."""
        axes = [axis for axis, name in enumerate(names) if name not in kept]
        return self.builder.emit(relax.op.sum(x, axes)) if axes else x

    def _permuted(self, x: relax.Expr, names, wanted: str) -> relax.Expr:
        axes = [list(names).index(name) for name in wanted]
        return x if axes == list(range(len(axes))) else self.builder.emit(relax.op.permute_dims(x, axes))

    def _shaped(self, x: relax.Expr, axes: list[str]) -> relax.Expr:
        """In which each axis is the product of some labels, of none 1."""
        shape = [math.prod(self.extents[name] for name in names) for names in axes]
        return x if list(shape_of(x)) == shape else self.builder.emit(relax.op.reshape(x, shape))
