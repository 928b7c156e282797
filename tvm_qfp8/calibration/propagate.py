"""What a change of some layers does to a program's outputs: only what the change reaches is computed again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tvm_qfp8.calibration.evaluate import Program, Step

Change = Callable[[Step, Mapping[str, Any]], Any]
"""(step, values) -> what the step gives instead."""


def outputs_with(
    program: Program, changes: Mapping[str, Change], values: Mapping[str, Any]
) -> list[np.ndarray]:
    """The outputs with some steps changed, by variable name; ``values`` are all values of the float32 program."""
    changed: dict[str, Any] = {}
    seen = _Overlay(changed, values)
    for step in program.steps:
        if step.name in changes:
            changed[step.name] = changes[step.name](step, seen)
        elif any(read in changed for read in step.reads):
            changed[step.name] = step.run(seen)
    return program.outputs(seen)


class _Overlay(Mapping[str, Any]):
    """Changed values before the original ones."""

    def __init__(self, changed: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        self._changed, self._values = changed, values

    def __getitem__(self, name: str) -> Any:
        return self._changed[name] if name in self._changed else self._values[name]

    def __iter__(self):
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def energy(arrays: Sequence[np.ndarray], mask: np.ndarray | None) -> float:
    """Sum of squares of all float arrays; rows of tokens that ``mask`` calls invalid do not count."""
    return sum(
        float(np.sum(np.square(_valid(array, mask), dtype=np.float64)))
        for array in arrays
        if array.dtype.kind == "f"
    )


def _valid(array: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The rows of valid tokens, where an array has one row for each element of the mask."""
    if mask is None or array.ndim < 2 or array.size != mask.size * array.shape[-1] or not mask.any():
        return array
    return array.reshape(mask.size, -1)[mask.reshape(-1) != 0]
