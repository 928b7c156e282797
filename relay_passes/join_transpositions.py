"""Makes one transposition, of as few axes as it takes, of a chain of views and transpositions.

PyTorch's attention works on tokens first, and moves the axis of the batch past others on its way; where the batch is
one, half of that is no movement. Before::

    lv = R.reshape(x, R.shape([1, 50, 1, 3, 768]))
    lv1 = R.permute_dims(lv, axes=[3, 1, 2, 0, 4])
    lv2 = R.reshape(lv1, R.shape([3, 50, 1, 768]))

After::

    lv1 = R.reshape(x, R.shape([1, 50, 3, 768]))
    lv2 = R.permute_dims(lv1, axes=[2, 1, 0, 3])

Axes of one place come first before a transposition. In this form parts of a dense layer are found (``SplitDense``), and
products of two activations take in swaps of tokens and heads (``FoldHeads``).
"""

from __future__ import annotations

import math

import numpy as np
import tvm
from tvm import relax

from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter
from tvm_qfp8.relay_passes.simplify_views import VIEWS, elements_of_chain

TURNS = "relax.permute_dims"


@tvm.transform.module_pass(opt_level=0, name="JoinTranspositions")
class JoinTranspositions:
    """Rewrite ``main``; what is not read any more is removed."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


class _Rewriter(MainRewriter):
    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        chain = self._chain(var) if op_name(value) in (*VIEWS, TURNS) and static_shape(var) else []
        steps = self._joined(chain) if chain else []
        if not steps:
            self.keep(var, value)
            return
        *before, (operator, argument) = steps
        result = self.expression(chain[-1])
        for view, shape in before:
            result = self.builder.emit(view(result, shape))
        self.variables[var] = self.builder.emit(operator(result, argument), var.name)

    def _chain(self, var: relax.Var) -> list[relax.Var]:
        """``var``, what it views or transposes and nothing else reads, and so on to what the chain starts from."""
        chain = [var]
        while op_name(self.definition.get(chain[-1])) in (*VIEWS, TURNS):
            source = self.definition[chain[-1]].args[0]
            if len(chain) > 1 and self.uses[chain[-1]] > 1:
                break
            if not isinstance(source, relax.Var) or not static_shape(source):
                break
            chain.append(source)
        return chain

    def _joined(self, chain: list[relax.Var]) -> list[tuple]:
        """Operators and their arguments for a chain with transpositions; none where they would be no fewer."""
        turns = [var for var in chain[:-1] if op_name(self.definition[var]) == TURNS]
        source, shape = chain[-1], shape_of(chain[0])
        if not turns or math.prod(shape) == 0:
            return []
        axes = _moved_axes(elements_of_chain(self.definition, chain))
        if axes is None:
            return []
        split = _split_as(axes, shape)
        steps = _steps(split or axes, shape_of(source), shape, with_ones=split is not None)
        fewer = len(steps) < len(chain) - 1
        return steps if fewer or len(steps) == len(chain) - 1 and any(map(self._moves_ones, turns)) else []

    def _moves_ones(self, var: relax.Var) -> bool:
        """Whether a transposition moves axes of one place."""
        value = self.definition[var]
        shape = shape_of(value.args[0])
        axes = range(len(shape))[::-1] if value.attrs.axes is None else [int(a) for a in value.attrs.axes]
        return any(shape[axis] == 1 and axis != place for place, axis in enumerate(axes))


def _steps(
    axes: list[tuple[int, int]], source: tuple[int, ...], shape: tuple[int, ...], with_ones: bool
) -> list[tuple]:
    """A transposition that moves ``axes``, and views around it where they are needed.

    With all of ``shape``'s axes of one place, if ``axes`` are its others, else with as many as ``source`` has.
    """
    order = sorted(range(len(axes)), key=lambda axis: -axes[axis][1])
    ones = max(0, len(shape if with_ones else source) - len(axes))
    before = (*[1] * ones, *(axes[axis][0] for axis in order))
    places = iter(ones + order.index(axis) for axis in range(len(axes)))
    free = iter(range(ones))
    if with_ones:
        turned = [next(free) if extent == 1 else next(places) for extent in shape]
    else:
        turned = [*free, *places]
    steps: list[tuple] = [(relax.op.reshape, before)] if before != source else []
    steps.append((relax.op.permute_dims, turned))
    return steps if with_ones else [*steps, (relax.op.reshape, shape)]


def _split_as(axes: list[tuple[int, int]], shape: tuple[int, ...]) -> list[tuple[int, int]] | None:
    """``axes``, split where ``shape`` is; None where that is no mere split."""
    wanted, found = [extent for extent in shape if extent != 1], []
    for extent, stride in axes:
        while extent > 1:
            if not wanted or extent % wanted[0]:
                return None
            part = wanted.pop(0)
            extent //= part
            found.append((part, stride * extent))
    return found


def _moved_axes(elements: np.ndarray) -> list[tuple[int, int]] | None:
    """(extent, stride) of the fewest axes in whose order ``elements``, numbers of elements, are; None where of none.

    There is more than one axis, and none of one place.
    """
    axes: list[tuple[int, int]] = []
    flat, block = elements.reshape(-1), 1
    while block < flat.size:
        firsts = flat[::block]
        stride = int(firsts[1])
        steps = np.flatnonzero(firsts != stride * np.arange(len(firsts)))
        extent = int(steps[0]) if len(steps) else len(firsts)
        if len(firsts) % extent:
            return None
        axes.insert(0, (extent, stride))
        block *= extent
    grid = sum(
        (np.arange(extent) * stride).reshape([-1] + [1] * (len(axes) - 1 - i))
        for i, (extent, stride) in enumerate(axes)
    )
    return axes if len(axes) > 1 and np.array_equal(np.reshape(grid, -1), flat) else None
