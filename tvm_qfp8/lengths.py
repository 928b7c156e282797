"""Which program of a module runs inputs of a length, and what padding means: see ``importers.open_length``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_qfp8.errors import InputError, ModelError
from tvm_qfp8.tensor_info import TensorInfo, tensor_entries, tensor_infos

SHORTEST, FINEST_STEP = 8, 4
"""Fewer rows take about as long, and their kernels may pack the weights in a way of their own."""


def lengths_up_to(longest: int) -> list[int]:
    """Lengths for a module that takes any up to ``longest``, each at most a quarter longer than the one before.

    Padding then costs about a tenth: ``lengths_up_to(128)`` is 8, 12, ..., 32, 40, 48, 56, 64, 80, 96, 112, 128.

    Raises
    ------
    ModelError
        ``longest`` is no positive number.
    """
    if longest < 1:
        raise ModelError(f"the longest input has {longest} elements; give a positive number, such as 128")
    found = [min(SHORTEST, longest)]
    while found[-1] < longest:
        # An eighth of the next power of two.
        step = max(FINEST_STEP, 1 << (found[-1].bit_length() - 3))
        found.append(min(found[-1] + step, longest))
    return found


@dataclass(frozen=True)
class Variant:
    """The program of a module for one length."""

    length: int
    function: str
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]


@dataclass(frozen=True)
class Lengths:
    """The lengths of a module.

    Attributes
    ----------
    axes : dict of str to int
        The axis of each input that has the length.
    padding : bool
        Whether shorter inputs are padded with zeros up to the next length: only where outputs do not see it.
    variants : list of Variant
        Ascending.
    """

    axes: Mapping[str, int]
    padding: bool
    variants: list[Variant]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Lengths:
        """From ``to_json``'s result."""
        variants = [
            Variant(length, function, tensor_infos(inputs), tensor_infos(outputs))
            for length, function, inputs, outputs in data["variants"]
        ]
        return cls(data["axes"], data["padding"], variants)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        variants = [
            [v.length, v.function, tensor_entries(v.inputs), tensor_entries(v.outputs)] for v in self.variants
        ]
        return {"axes": dict(self.axes), "padding": self.padding, "variants": variants}

    def describe(self) -> str:
        """For the report."""
        listed = ", ".join(str(variant.length) for variant in self.variants)
        between = (
            "shorter inputs are padded with zeros" if self.padding else "no others: results may see padding"
        )
        return f"one program for each of the lengths {listed}, with the same weights; {between}"

    def length_of(self, arrays: Mapping[str, np.ndarray]) -> int:
        """The length that all ``arrays`` have; the longest of the module where one lacks the axis.

        Raises
        ------
        InputError
            Their lengths differ.
        """
        found = {
            name: arrays[name].shape[axis] for name, axis in self.axes.items() if arrays[name].ndim > axis
        }
        if len(set(found.values())) > 1:
            shown = ", ".join(f"{length} in {name!r}" for name, length in found.items())
            raise InputError(f"inputs have different lengths: {shown}")
        return next(iter(found.values()), self.variants[-1].length)

    def variant_for(self, length: int) -> Variant:
        """What runs inputs of ``length``, padded where they are shorter.

        Raises
        ------
        InputError
            They are too long, empty, or shorter where padding may change results.
        """
        known = [variant.length for variant in self.variants]
        listed = ", ".join(map(str, known))
        if length in known:
            return self.variants[known.index(length)]
        if not 0 < length < known[-1]:
            raise InputError(f"inputs have length {length}, the module is compiled for {listed}")
        if not self.padding:
            raise InputError(
                f"inputs have length {length}, the module is compiled for {listed}, and padding them may change its "
                "results; give one of these lengths"
            )
        return next(variant for variant in self.variants if variant.length > length)

    def pad(self, arrays: Mapping[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
        """Arrays with zeros behind their values, up to ``length``."""
        return {
            name: padded(array, self.axes[name], length) if name in self.axes else array
            for name, array in arrays.items()
        }

    def cut(self, results: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
        """Results of padded inputs without what belongs to the padding."""
        axes = varying_axes([[info.shape for info in variant.outputs] for variant in self.variants])
        return [
            np.ascontiguousarray(cut(result, own, length)) for result, own in zip(results, axes, strict=True)
        ]


def varying_axes(shapes: Sequence[Sequence[tuple[int, ...]]]) -> list[list[int]]:
    """The axes of each tensor whose extents differ; ``shapes`` has all tensors' shapes at each length."""
    return [
        [axis for axis, extents in enumerate(zip(*tensor, strict=True)) if len(set(extents)) > 1]
        for tensor in zip(*shapes, strict=True)
    ]


def cut(array: np.ndarray, axes: Sequence[int], length: int) -> np.ndarray:
    """The first ``length`` elements along each of ``axes``."""
    return array[tuple(slice(length if axis in axes else None) for axis in range(array.ndim))]


def padded(array: np.ndarray, axis: int, length: int) -> np.ndarray:
    """``array`` with zeros behind ``axis``'s values, up to ``length``."""
    shape = list(array.shape)
    shape[axis] = length
    result = np.zeros(shape, array.dtype)  # np.pad takes ten times as long
    result[tuple(map(slice, array.shape))] = array
    return result
