"""What is known of a module's inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape and dtype of an input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def tensor_entries(infos: Iterable[TensorInfo]) -> list:
    """Inputs or outputs as the metadata hold them."""
    return [[info.name, list(info.shape), info.dtype] for info in infos]


def tensor_infos(entries: list) -> list[TensorInfo]:
    """What ``tensor_entries`` wrote."""
    return [TensorInfo(name, tuple(shape), dtype) for name, shape, dtype in entries]
