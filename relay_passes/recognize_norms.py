"""Recognises LayerNorm, RMSNorm and InstanceNorm that a file holds as many small operators.

Runs right after import. Before (as Keras writes LayerNorm)::

    mean, var = R.mean(x, [-1], keepdims=True), R.variance(x, [-1], keepdims=True)
    inv = R.multiply(R.rsqrt(R.add(var, 1e-6)), gamma)
    shift = R.add(R.multiply(R.negative(mean), inv), beta)
    y = R.add(R.multiply(x, inv), shift)

After::

    lv = R.nn.layer_norm(x, ones, zeros, axes=[-1])
    y = R.add(R.multiply(lv, gamma), beta)

Means and variances may be over any axis, written as sums, and lose their axis in between. The operators between ``x``
and ``y`` are evaluated on rows whose scales lie far apart; where the result is a scale times the normalised rows plus a
shift, the same for all rows, they are a norm. Scale and shift are taken in by ``FoldLayerNorm``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.relay_passes.cones import BINARY, UNARY, ConeRewriter
from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape

RESULTS = ("relax.divide", "relax.multiply", "relax.add", "relax.subtract")
REDUCTIONS = {"relax.mean": np.mean, "relax.variance": np.var, "relax.sum": np.sum}
VIEWS = ("relax.reshape", "relax.squeeze", "relax.expand_dims", "relax.broadcast_to")
ALLOWED = (*UNARY, *BINARY, *REDUCTIONS, *VIEWS)
ROW_SCALES = (0.3, 1.0, 4.0)
"""And as much of the root of each constant that may be epsilon: so it is one that is added, and no floor."""
MOST_VALUES = 2**18
"""Of a row; more are not evaluated."""
FEW = 64
"""Places along an axis that tell as much as more do, where each is treated alike."""


@dataclass(frozen=True)
class Norm:
    """``scale * normalised(source) + shift``; arrays of the source's rank, or None where they are 1 and 0."""

    source: relax.Var
    axes: tuple[int, ...]
    epsilon: float
    centred: bool
    """Whether the mean is taken off: LayerNorm, else RMSNorm."""
    scale: np.ndarray | None
    shift: np.ndarray | None


@tvm.transform.module_pass(opt_level=0, name="RecognizeNorms")
class RecognizeNorms:
    """Rewrite ``main``; what the norms were made of is left to dead code elimination."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


class _Rewriter(ConeRewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.norms: set[relax.Var] = set()

    def replacement(self, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if op_name(value) not in RESULTS or str(var.ty.dtype) != "float32":
            return None
        norm = self._norm(var)
        if norm is None:
            return None
        self.norms.add(var)
        y = self._emit(norm)
        for operator, array in ((relax.op.multiply, norm.scale), (relax.op.add, norm.shift)):
            if array is not None:
                y = operator(self.builder.emit(y), relax.const(array.astype(np.float32)))
        return y

    def _emit(self, norm: Norm) -> relax.Expr:
        """The norm over its axes; of an image with channels last, over height and width, in NCHW."""
        x, rank = self.expression(norm.source), len(shape_of(norm.source))
        turned = norm.axes == (1, 2) and rank == 4
        if turned:
            x = self.builder.emit(relax.op.permute_dims(x, [0, 3, 1, 2]))
        axes = [-2, -1] if turned else [axis - rank for axis in norm.axes]
        shape = [int(x.ty.shape[axis]) for axis in axes]
        one, zero = (relax.const(np.full(shape, number, np.float32)) for number in (1.0, 0.0))
        if norm.centred:
            y = relax.op.nn.layer_norm(x, one, zero, axes=axes, epsilon=norm.epsilon)
        else:
            y = relax.op.nn.rms_norm(x, one, axes=axes, epsilon=norm.epsilon)
        return relax.op.permute_dims(self.builder.emit(y), [0, 2, 3, 1]) if turned else y

    def _norm(self, var: relax.Var) -> Norm | None:
        rms: Norm | None = None
        for source in self.sources(var, ALLOWED, arrays=True):
            if static_shape(source) != static_shape(var) or not static_shape(source):
                continue
            cone, constants = self.cone(var, source)
            axes = None if self.norms.intersection(cone) else self._axes(cone, source)
            if axes is None:
                continue
            epsilons = sorted({number for number in constants if 0 < number < 1e-1})
            found = self._matching(cone, source, axes, epsilons)
            if found is not None and found.centred:
                return found
            # A source further away may hold the mean too: then it is LayerNorm.
            rms = rms or found
        return rms

    def _axes(self, cone: list[relax.Var], source: relax.Var) -> tuple[int, ...] | None:
        """The axes that all of a cone's reductions are over; None where they differ, or operands do not align."""
        shape = shape_of(source)
        rank = len(shape)
        axes: tuple[int, ...] | None = None
        for v in cone:
            call = self.definition[v]
            if op_name(call) not in REDUCTIONS:
                continue
            if static_shape(call.args[0]) != shape or call.attrs.axis is None:
                return None
            found = tuple(sorted(int(axis) % rank for axis in call.attrs.axis))
            if axes is not None and found != axes:
                return None
            axes = found
        if axes is None:
            return None
        last = tuple(range(rank - len(axes), rank))
        if len(axes) > 1 and axes != last and (rank, axes) != (4, (1, 2)):
            return None
        if not all(self._aligns(self.definition[v], shape, axes) for v in cone):
            return None
        return axes

    def _aligns(self, call: relax.Call, shape: tuple[int, ...], axes: tuple[int, ...]) -> bool:
        """Whether an operator would do the same if reductions kept their axes as 1."""
        kept = tuple(1 if axis in axes else extent for axis, extent in enumerate(shape))
        dropped = tuple(extent for axis, extent in enumerate(shape) if axis not in axes)
        name = op_name(call)
        if name in REDUCTIONS:
            return static_shape(call) in (kept, dropped)
        if name in VIEWS:
            spread = name == "relax.broadcast_to"
            before, after = static_shape(call.args[0]), static_shape(call)
            return before == kept and after == shape if spread else {before, after} <= {kept, dropped}
        if static_shape(call) not in (shape, kept, dropped):
            return False
        ranks = set()
        for argument in call.args:
            constant = self.constant(argument) if isinstance(argument, relax.Var | GenericConst) else None
            if constant is None:
                if isinstance(argument, relax.Var):
                    ranks.add(len(shape_of(argument)))
                continue
            extents = constant.value.numpy().shape
            if all(extent == 1 for extent in extents):
                continue
            # One for each place in a row.
            padded = (1,) * (len(shape) - len(extents)) + extents
            if any(
                extent not in (1, shape[axis] if axis in axes else 1) for axis, extent in enumerate(padded)
            ):
                return False
            ranks.add(len(shape))
        return len(ranks) == 1

    def _depends_on_length(self, cone: list[relax.Var]) -> bool:
        """Whether a cone sums up, which a constant makes a mean of, or has a constant for each place of a row."""
        calls = [self.definition[v] for v in cone]
        constants = [
            self.constant(a) for call in calls for a in call.args if isinstance(a, relax.Var | GenericConst)
        ]
        return any(op_name(call) == "relax.sum" for call in calls) or any(
            constant is not None and constant.value.numpy().size > 1 for constant in constants
        )

    def _matching(
        self,
        cone: list[relax.Var],
        source: relax.Var,
        axes: tuple[int, ...],
        epsilons: list[float],
    ) -> Norm | None:
        """The norm that the first variable of a cone is."""
        shape = shape_of(source)
        extents = [extent if axis in axes else 1 for axis, extent in enumerate(shape)]
        if not self._depends_on_length(cone):
            extents = [min(extent, FEW) for extent in extents]
        if not epsilons or np.prod(extents) > MOST_VALUES or 0 in shape:
            return None
        # Rows are a new axis in front, which stands for all that are not normalised.
        last = tuple(axis - len(shape) for axis in axes)
        scales = np.outer([1.0, *np.sqrt(epsilons)], ROW_SCALES).reshape(-1, *[1] * len(shape))
        rows = scales * (np.random.default_rng(0).standard_normal((len(scales), *extents)) * 2 + 0.5)
        own = {name: (lambda x, f=f: f(x, axis=last, keepdims=True)) for name, f in REDUCTIONS.items()}
        got = self.evaluate(cone[0], source, rows, {**own, **dict.fromkeys(VIEWS, lambda x: x)})
        if got.shape != rows.shape or not np.isfinite(got).all():
            return None
        for epsilon in epsilons:
            for centred in (True, False):
                values = rows - rows.mean(last, keepdims=True) if centred else rows
                normalised = values / np.sqrt((values**2).mean(last, keepdims=True) + epsilon)
                affine = _affine(normalised, got)
                if affine is not None:
                    return Norm(source, axes, epsilon, centred, *affine)
        return None


def _affine(normalised: np.ndarray, got: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None] | None:
    """(scale, shift) of each place, the same for all rows; None where there are none that fit."""
    centre, mean = normalised.mean(0), got.mean(0)
    deviation = normalised - centre
    with np.errstate(invalid="ignore"):  # a row of one place is 0 whatever it holds
        scale = (deviation * (got - mean)).sum(0) / (deviation**2).sum(0)
    shift = mean - scale * centre
    largest = max(1.0, float(np.abs(got).max()))
    if not np.allclose(scale * normalised + shift, got, rtol=1e-6, atol=1e-8 * largest):
        return None
    if np.allclose(shift, 0, atol=1e-7 * largest):
        shift = None
    return (None if np.allclose(scale, 1, rtol=1e-6) else scale), shift
