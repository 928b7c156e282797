"""A dimension that takes several lengths: ``input_shapes={"input_ids": (1, lengths_up_to(128))}``, or a list of them.

Programs have static shapes: a module holds one for each length, and all take the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tvm_qfp8.errors import ModelError

Extent = int | str | Iterable[int]
Shapes = Mapping[str, tuple[Extent, ...]]
"""Shapes of inputs: a name stands for an open batch, a list for the lengths of a dimension."""
ShapesAtLength = Mapping[str, tuple[int | str, ...]]
"""The same without lists."""


def _at(extent: Extent, length: int) -> int | str:
    return extent if isinstance(extent, str) else length if isinstance(extent, Iterable) else int(extent)


@dataclass(frozen=True)
class OpenLength:
    """Lengths that a module is compiled for, ascending, and the axis of each input that has them."""

    lengths: tuple[int, ...]
    axes: Mapping[str, int]

    def shapes_at(self, input_shapes: Shapes, length: int) -> ShapesAtLength:
        """``input_shapes`` with ``length`` in the place of the list."""
        return {name: tuple(_at(extent, length) for extent in shape) for name, shape in input_shapes.items()}

    def of_inputs(self, names: Iterable[str]) -> OpenLength:
        """The same for these inputs."""
        return OpenLength(self.lengths, {name: self.axes[name] for name in names if name in self.axes})


def open_length(input_shapes: Shapes) -> OpenLength | None:
    """The lengths that ``input_shapes`` list; None without a list.

    Raises
    ------
    ModelError
        A list is empty or holds other than positive integers, an input has two, or inputs have different ones.
    """
    found: set[tuple[int, ...]] = set()
    axes: dict[str, int] = {}
    for name, shape in input_shapes.items():
        for axis, extent in enumerate(shape):
            if isinstance(extent, str) or not isinstance(extent, Iterable):
                continue
            lengths = tuple(sorted({int(length) for length in extent}))
            if not lengths or lengths[0] < 1:
                raise ModelError(
                    f"input {name!r} has the lengths {list(extent)}; give positive integers, such as [16, 32, 64]"
                )
            if name in axes:
                raise ModelError(
                    f"input {name!r} is given as {tuple(shape)}: one dimension of an input may have several lengths"
                )
            found.add(lengths)
            axes[name] = axis
    if len(found) > 1:
        shown = " and ".join(str(list(lengths)) for lengths in sorted(found))
        raise ModelError(f"inputs have different lengths, {shown}; give all inputs the same list")
    return OpenLength(found.pop(), axes) if found else None
