"""Decompositions of indexing: negative and joint indices, windows, bags of embeddings."""

from __future__ import annotations

import math
from typing import Any


def select(x: Any, dim: int, index: int) -> Any:
    """TVM counts a negative index from the wrong end of the memory."""
    if index >= 0:
        return NotImplemented
    start = x.shape[dim] + index
    return x.narrow(dim, start, 1).squeeze(dim)


def index(x: Any, indices: list[Any]) -> Any:
    """Indexed dimensions become one, which one ``index_select`` reads."""
    joined = _joined(x, indices)
    if joined is None:
        return NotImplemented
    order, rows, flat, shape = joined
    first = len([i for i in indices if i is not None])
    if first == 1:  # in place: transpositions would take images out of their layout
        taken = x.index_select(order[0], flat.reshape(-1))
        if len(shape) == 1:
            return taken
        return taken.reshape(*x.shape[: order[0]], *shape, *x.shape[order[0] + 1 :])
    taken = rows.index_select(0, flat.reshape(-1)).reshape(*shape, *(x.shape[d] for d in order[first:]))
    if order[:first] != list(range(order[0], order[0] + first)):
        return taken  # indices apart from each other come first in the result
    front, inner = len(shape), list(range(len(shape), taken.dim()))
    return taken.permute(*inner[: order[0]], *range(front), *inner[order[0] :])


def index_put(x: Any, indices: list[Any], values: Any, accumulate: bool = False) -> Any:
    """Rows scattered into what ``index`` reads."""
    joined = _joined(x, indices)
    if joined is None:
        return NotImplemented
    order, rows, flat, shape = joined
    first = len([i for i in indices if i is not None])
    inner = [x.shape[d] for d in order[first:]]
    if order[:first] == list(range(order[0], order[0] + first)) and order[0]:
        lead = order[0]
        values = values.expand(*(x.shape[d] for d in range(lead)), *shape, *inner[lead:])
        values = values.permute(
            *range(lead, lead + len(shape)), *range(lead), *range(lead + len(shape), values.dim())
        )
    values = values.expand(*shape, *inner).reshape(flat.numel(), -1)
    where = flat.reshape(-1, 1).expand(-1, values.shape[1])
    put = rows.reshape(rows.shape[0], -1)
    put = put.scatter_add(0, where, values) if accumulate else put.scatter(0, where, values)
    back = [order.index(d) for d in range(x.dim())]
    return put.reshape([x.shape[d] for d in order]).permute(back)


def _joined(x: Any, indices: list[Any]) -> tuple[list[int], Any, Any, list[int]] | None:
    """(dimensions with the indexed ones in front, ``x`` so with those joined, its indices, their shape).

    None for masks, whose result has no fixed shape.
    """
    import torch

    dims = [d for d, index in enumerate(indices) if index is not None]
    given = [indices[d] for d in dims]
    if any(index.dtype in (torch.bool, torch.uint8) for index in given):
        return None
    order = dims + [d for d in range(x.dim()) if d not in dims]
    flat: Any = 0
    for d, index in zip(dims, given, strict=True):
        extent = x.shape[d]
        flat = flat * extent + torch.where(index < 0, index + extent, index)
    rows = x.permute(order).reshape(-1, *(x.shape[d] for d in order[len(dims) :]))
    return order, rows, flat, list(flat.shape)


def unfold(x: Any, dim: int, size: int, step: int) -> Any:
    """Windows of ``size`` along ``dim``, which come last."""
    import torch

    dim = dim % max(x.dim(), 1)
    count = (x.shape[dim] - size) // step + 1
    windows = torch.arange(count)[:, None] * step + torch.arange(size)[None, :]
    taken = x.index_select(dim, windows.reshape(-1))
    return taken.unflatten(dim, (count, size)).movedim(dim + 1, -1)


def embedding_bag(
    weight: Any, indices: Any, offsets: Any, _scale: bool = False, mode: int = 0, _sparse: bool = False,
    weights: Any = None, last: bool = False, padding: int | None = None,
) -> Any:  # fmt: skip
    """Sums, means (``mode`` 1) or maxima (2) of the embeddings of each bag."""
    import torch

    if padding is not None or indices.dim() != 1 or last:
        return NotImplemented
    rows = weight.index_select(0, indices)
    if weights is not None:
        rows = rows * weights[:, None]
    bag = (offsets[None, :] <= torch.arange(rows.shape[0])[:, None]).sum(1) - 1
    where = bag[:, None].expand(rows.shape)
    empty = rows.new_full((offsets.shape[0], rows.shape[1]), -math.inf if mode == 2 else 0.0)
    pooled = empty.scatter_reduce(0, where, rows, "amax" if mode == 2 else "sum")
    if mode == 2:
        pooled = torch.where(pooled == -math.inf, 0.0, pooled)
    if mode == 1:
        sizes = (bag[None, :] == torch.arange(offsets.shape[0])[:, None]).sum(1, keepdim=True)
        pooled = pooled / sizes.clamp(min=1).to(rows.dtype)
    return pooled, offsets, offsets, offsets
