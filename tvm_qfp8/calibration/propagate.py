"""What a change of some layers does to a program's outputs: only what the change reaches is computed again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from tvm_qfp8.calibration.evaluate import Name, Program, Step
from tvm_qfp8.calibration.output_error import row_weights

_SOFTMAX = ("relax.nn.softmax", "relax.nn.log_softmax")
_KEEPS_VALUES = ("alias", "relax.reshape", "relax.squeeze", "relax.expand_dims")

Change = Callable[[Step, Mapping[str, Any]], Any]
"""(step, values) -> what the step gives instead."""


def values_with(
    program: Program, changes: Mapping[str, Change], values: Mapping[str, Any], wanted: Collection[str]
) -> Mapping[str, Any]:
    """The values of the variables ``wanted`` with some steps changed; ``values`` are all of the float32 program.

    Others are given up after their last reader, so that what follows finds their memory, which is in cache and costs
    the system no new pages.
    """
    changed: dict[str, Any] = {}
    seen = Overlay(changed, values)
    for step in program.steps:
        if step.name in changes:
            changed[step.name] = changes[step.name](step, seen)
        elif any(read in changed for read in step.reads):
            changed[step.name] = step.run(seen)
        for name in program.last_reads[step.name]:
            if name not in wanted:
                changed.pop(name, None)
    return seen


class Compared:
    """What stands for a program's outputs where errors are compared: of a softmax its input, less the mean.

    Probabilities near 0 and 1 hide an error until a decision turns over, and then show nothing else.
    """

    def __init__(self, program: Program) -> None:
        self._made = {step.name: step for step in program.steps}
        results = program.result if isinstance(program.result, tuple) else (program.result,)
        self._results = [self._source(part.name) if isinstance(part, Name) else part for part in results]

    def _source(self, name: str) -> tuple[str, bool]:
        """The variable to look at, and whether it holds logits."""
        step = self._made.get(name)
        while step is not None and isinstance(step.arguments[0], Name):
            source = step.arguments[0].name
            if step.operator in _SOFTMAX:
                return source, True
            if step.operator not in _KEEPS_VALUES:
                break
            step = self._made.get(source)
        return name, False

    @property
    def names(self) -> set[str]:
        """The variables that are looked at."""
        return {result[0] for result in self._results if isinstance(result, tuple)}

    def values(self, values: Mapping[str, Any]) -> list[np.ndarray]:
        """From the values of ``names``; integers and booleans have no error to speak of."""
        return [array for array in self.of_outputs(values) if array.dtype.kind == "f"]

    def of_outputs(self, values: Mapping[str, Any]) -> list[np.ndarray]:
        """The same of all outputs."""
        found: list[np.ndarray] = []
        for result in self._results:
            if not isinstance(result, tuple):
                found.append(result)
                continue
            name, is_logits = result
            value = values[name]
            if isinstance(value, tuple):
                found += value
            else:
                found.append(value - value.mean(-1, keepdims=True) if is_logits else value)
        return found


class Overlay(Mapping[str, Any]):
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


def relative_energy(
    changes: Sequence[np.ndarray], arrays: Sequence[np.ndarray], mask: np.ndarray | None
) -> float:
    """Energy of ``changes`` over that of ``arrays``: the mean of rows (tokens, or vectors of logits), and of arrays.

    Of images, ``(batch, channels, height, width)``, each is one row.
    """
    found = []
    for change, array in zip(changes, arrays, strict=True):
        if array.dtype.kind != "f" or not array.size:
            continue
        rows = [
            part.reshape(len(part), -1)
            if part.ndim == 4
            else part.reshape(-1, part.shape[-1] if part.ndim else 1)
            for part in (_valid(change, mask), _valid(array, mask))
        ]
        energies = np.square(rows[0], dtype=np.float64).sum(axis=1)
        found.append(float(energies @ row_weights(rows[1])) / len(energies))
    return float(np.mean(found)) if found else 0.0


def _valid(array: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The rows of valid tokens, where an array has one row for each element of the mask."""
    if mask is None or array.ndim < 2 or array.size != mask.size * array.shape[-1] or not mask.any():
        return array
    return array.reshape(mask.size, -1)[mask.reshape(-1) != 0]
