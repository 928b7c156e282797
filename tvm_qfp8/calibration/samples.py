"""Calibration samples, checked one by one against the module's inputs."""

from __future__ import annotations

import itertools
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tvm_qfp8.calibration.evaluate import TensorSpec
from tvm_qfp8.errors import CalibrationError
from tvm_qfp8.lengths import padded

Batches = Iterable[Mapping[str, np.ndarray]] | Mapping[str, np.ndarray] | str | os.PathLike[str]


def samples_of(batches: Batches, inputs: Mapping[str, TensorSpec]) -> Iterator[dict[str, np.ndarray]]:
    """Samples in the shapes of the module's inputs.

    Parameters
    ----------
    batches : iterable of {input name: array}, or one such dict, or path of an .npz file
        Arrays with k times an input's first dimension, or with a new first axis of k, are k samples; names that are no
        input are ignored.
    inputs : dict of str to TensorSpec
        What each sample must hold.

    Raises
    ------
    CalibrationError
        Naming the sample's index, the input, what was found and what was expected.
    """
    index = 0
    for batch in _dicts(batches, inputs):
        if not isinstance(batch, Mapping):
            raise CalibrationError(
                f"calibration sample {index} is a {type(batch).__name__}; expected a dict of name to array"
            )
        joined = {name: _joined(array, inputs.get(name)) for name, array in batch.items()}
        count = _count(joined, inputs, index)
        for part in range(count):
            sample = {name: _part(joined[name], part, count) for name in inputs}
            for name, spec in inputs.items():
                _check(index, name, sample[name], spec)
            yield sample
            index += 1


def padded_samples(
    batches: Batches, inputs: Mapping[str, TensorSpec], axes: Mapping[str, int]
) -> Iterator[Mapping[str, np.ndarray]]:
    """Samples with zeros behind what is shorter than an input along its axis of ``axes``, for ``samples_of``."""
    for batch in _dicts(batches, inputs):
        if not isinstance(batch, Mapping):
            yield batch  # refused by name later
            continue
        found = dict(batch)
        for name in found.keys() & axes.keys():
            array, shape = np.asarray(found[name]), inputs[name].shape
            axis = array.ndim + axes[name] - len(shape)  # there may be a new first axis
            if axis >= 0 and array.shape[axis] < shape[axes[name]]:
                found[name] = padded(array, axis, shape[axes[name]])
        yield found


def first_samples(
    batches: Batches | None, inputs: Mapping[str, TensorSpec], count: int
) -> tuple[Batches | None, list[dict[str, np.ndarray]]]:
    """All samples again, to be consumed once, and a list of the first ``count`` of them.

    Only these are held; the rest of a generator is still to come.
    """
    if batches is None:
        return None, []
    samples = samples_of(batches, inputs)
    first = list(itertools.islice(samples, count))
    return itertools.chain(first, samples), first


def _dicts(batches: Batches, inputs: Mapping[str, TensorSpec]) -> Iterable[Any]:
    """One dict after the other, of whatever kind ``batches`` are."""
    if isinstance(batches, str | os.PathLike):
        return [_load(Path(batches), inputs)]
    return [batches] if isinstance(batches, Mapping) else batches


def _load(path: Path, inputs: Mapping[str, TensorSpec]) -> dict[str, np.ndarray]:
    """The module's inputs from an .npz file; other arrays in it are not read."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files if name in inputs}
    except (OSError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CalibrationError(
            f"calibration file {path} cannot be read ({reason}); expected an .npz with one array per input"
        ) from error


def _joined(array: np.ndarray, spec: TensorSpec | None) -> np.ndarray:
    """Samples along a new first axis, one after the other along the input's own; other arrays as they are."""
    array = np.asarray(array)
    if spec is not None and spec.shape and array.shape[1:] == spec.shape:
        return array.reshape(-1, *spec.shape[1:])
    return array


def _count(batch: Mapping[str, np.ndarray], inputs: Mapping[str, TensorSpec], index: int) -> int:
    """How many samples a dict holds: 1, or k if every array has k times its input's first dimension."""
    counts = set()
    for name, spec in inputs.items():
        if name not in batch:
            raise CalibrationError(
                f"calibration sample {index} misses input {name!r}: "
                f"found {', '.join(map(repr, batch)) or 'nothing'}, expected {', '.join(map(repr, inputs))}"
            )
        found = np.shape(batch[name])
        whole = bool(spec.shape and found and spec.shape[0] and not found[0] % spec.shape[0])
        counts.add(found[0] // spec.shape[0] if whole and found[1:] == spec.shape[1:] else 1)
    return max(1, counts.pop()) if len(counts) == 1 else 1


def _part(array: np.ndarray, part: int, count: int) -> np.ndarray:
    if count == 1:
        return array
    step = len(array) // count
    return array[part * step : (part + 1) * step]


def _check(index: int, name: str, array: np.ndarray, spec: TensorSpec) -> None:
    where = f"calibration sample {index}, input {name!r}"
    if array.shape != spec.shape:
        raise CalibrationError(f"{where}: found shape {array.shape}, expected {spec.shape}")
    if str(array.dtype) != spec.dtype:
        raise CalibrationError(
            f"{where}: found dtype {array.dtype}, expected {spec.dtype}; convert with .astype({spec.dtype!r})"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise CalibrationError(f"{where}: found {array[place]} at {place}, expected finite values")
