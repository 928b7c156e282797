"""Operators of ``torch.export`` programs that TVM's front end does not know, or gets wrong, in terms of others.

Torch traces each function here into the program, as it does with its own decompositions. A function that returns
``NotImplemented`` leaves its operator as it is: TVM's converter is right about that case.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm_qfp8.importers import torch_images, torch_indexing
from tvm_qfp8.importers.torch_converters import known_operators
from tvm_qfp8.importers.torch_recurrent import CELLS, recurrent_operators


def decompose(program: Any) -> Any:
    """The program in core operators, with what TVM lacks in terms of what it has."""
    from torch._decomp import decomposition_table as known_to_torch
    from torch.export import default_decompositions

    table = default_decompositions()
    table.update(_table())
    for operator in recurrent_operators():
        table.pop(operator, None)
    program = program.run_decompositions(table)
    # A core operator of torch need not be one that TVM knows; most have a decomposition all the same.
    while more := {
        operator: known_to_torch[operator]
        for operator in _unknown_operators(program)
        if operator in known_to_torch and operator not in table
    }:
        table.update(more)
        program = program.run_decompositions(table)
    return program


def _unknown_operators(program: Any) -> set[Any]:
    from torch._ops import OpOverload

    known = known_operators() | CELLS.keys()
    called = {node.target for node in program.graph.nodes if isinstance(node.target, OpOverload)}
    return {operator for operator in called if f"{operator._opname}.{operator._overloadname}" not in known}


def _table() -> dict[Any, Callable]:
    import torch
    from torch._decomp import decomposition_table as known_to_torch

    aten = torch.ops.aten
    rounded = (aten.div.Tensor_mode, aten.floor_divide.default)
    resizes = (aten.upsample_bilinear2d.vec, aten.upsample_nearest2d.vec)
    of_floats = (
        aten.cos, aten.erf, aten.exp, aten.log, aten.log10, aten.log1p, aten.log2, aten.reciprocal, aten.rsqrt,
        aten.sigmoid, aten.sin, aten.sqrt, aten.tanh,
    )  # fmt: skip
    return {
        aten._cdist_forward.default: _cdist,
        aten.adaptive_max_pool2d.default: torch_images.adaptive_max_pool2d,
        aten.add.Tensor: _scaled(torch.add),
        aten.affine_grid_generator.default: torch_images.affine_grid,
        aten.any.default: lambda x: x.reshape(-1).any(0),
        aten.arange.start_step: _arange,
        aten.avg_pool2d.default: torch_images.avg_pool2d,
        aten.cat.default: _cat,
        aten.clamp.default: _clamp,
        aten.div.Tensor: _div,
        aten.embedding_bag.padding_idx: torch_indexing.embedding_bag,
        aten.erfc.default: lambda x: 1 - x.erf(),
        aten.exp2.default: lambda x: torch.pow(2.0, x),
        aten.fmax.default: torch.maximum,
        aten.fmin.default: torch.minimum,
        aten.hypot.default: lambda x, y: (x * x + y * y).sqrt(),
        aten.index.Tensor: torch_indexing.index,
        aten.index_put.default: torch_indexing.index_put,
        aten.max.dim: lambda x, dim, keepdim=False: (x.amax(dim, keepdim), x.argmax(dim, keepdim)),
        aten.min.dim: lambda x, dim, keepdim=False: (x.amin(dim, keepdim), x.argmin(dim, keepdim)),
        aten.select.int: torch_indexing.select,
        aten.sinh.default: lambda x: (x.exp() - (-x).exp()) / 2,
        aten.sub.Tensor: _scaled(torch.sub),
        aten.unfold.default: torch_indexing.unfold,
        aten.var_mean.correction: _var_mean,
        **{operator: _rounded_division(operator) for operator in rounded},
        **{operator: torch_images.upsample(known_to_torch[operator]) for operator in resizes},
        **{operator.default: _of_floats(operator) for operator in of_floats},
    }


def _scaled(function: Callable) -> Callable:
    """``add`` and ``sub`` with a factor on the second operand, which TVM leaves out."""
    return lambda x, y, alpha=1: NotImplemented if alpha == 1 else function(x, y * alpha)


def _div(x: Any, y: Any) -> Any:
    """Integers are divided as floats."""
    if x.is_floating_point() or isinstance(y, float) or getattr(y, "is_floating_point", bool)():
        return NotImplemented
    return x.float() / y


def _rounded_division(divide: Callable) -> Callable:
    """By an integer, which TVM makes an int32; its division of integers towards zero goes by floats."""

    def division(x: Any, y: Any, rounding_mode: str | None = "floor") -> Any:
        import torch

        if isinstance(y, float):
            return NotImplemented
        if not isinstance(y, torch.Tensor):
            y = torch.full((), y, dtype=x.dtype)
        elif x.is_floating_point() or rounding_mode == "floor":
            return NotImplemented
        if rounding_mode is None:
            return x / y
        if rounding_mode == "floor":
            return torch.floor_divide(x, y)
        if x.is_floating_point():
            return torch.trunc(x / y)
        return x.sign() * y.sign() * torch.floor_divide(x.abs(), y.abs())

    return division


def _of_floats(function: Callable) -> Callable:
    """Integers become floats, as torch has it."""
    return lambda x: NotImplemented if x.is_floating_point() else function(x.float())


def _clamp(x: Any, low: Any = None, high: Any = None) -> Any:
    """Integers with one bound: TVM takes infinity for the other."""
    import torch

    if x.is_floating_point() or None not in (low, high):
        return NotImplemented
    bound = torch.full((), high if low is None else low, dtype=x.dtype)
    return torch.minimum(x, bound) if low is None else torch.maximum(x, bound)


def _arange(start: Any, end: Any, step: Any = 1, *, dtype: Any = None, **options: Any) -> Any:
    """TVM counts one or two elements too many downwards."""
    import torch

    if step > 0:
        return NotImplemented
    count = math.ceil((end - start) / step)
    if dtype is None and all(isinstance(value, int) for value in (start, end, step)):
        dtype = torch.int64
    return torch.arange(count, dtype=dtype or torch.get_default_dtype(), **options) * step + start


def _cat(tensors: list[Any], dim: int = 0) -> Any:
    """torch lets tensors of no elements have any rank."""
    import torch

    some = [tensor for tensor in tensors if list(tensor.shape) != [0]]
    return torch.cat(some, dim) if 0 < len(some) < len(tensors) else NotImplemented


def _var_mean(x: Any, dim: Any = None, correction: Any = None, keepdim: bool = False) -> Any:
    import torch

    return torch.var(x, dim, correction=correction, keepdim=keepdim), x.mean(dim, keepdim)


def _cdist(a: Any, b: Any, p: float, _mode: int | None) -> Any:
    import torch

    difference = (a.unsqueeze(-2) - b.unsqueeze(-3)).abs()
    if p == 2:
        return (difference * difference).sum(-1).sqrt()
    return torch.linalg.vector_norm(difference, p, -1)
