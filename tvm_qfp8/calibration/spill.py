"""Values of all samples in temporary files, so that memory does not grow with their number.

Plain reads and writes at an offset, not a memory map: mapped pages count as the process's own memory and each
costs a page fault, while file pages belong to the system's cache, which gives them up when memory is short.
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tvm_qfp8.calibration.evaluate import Spec, TensorSpec


class SpilledTensor:
    """One array per sample, all of one shape and dtype, in one file."""

    def __init__(self, path: Path, spec: TensorSpec) -> None:
        self.path, self.shape, self.dtype = path, spec.shape, np.dtype(spec.dtype)
        self.nbytes = math.prod(spec.shape) * self.dtype.itemsize
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)

    def write(self, sample: int, array: np.ndarray) -> None:
        """Store the array of one sample."""
        data = np.ascontiguousarray(array, self.dtype).reshape(-1).view(np.uint8).data
        offset = sample * self.nbytes
        while data:
            written = os.pwrite(self._file, data, offset)
            data, offset = data[written:], offset + written

    def read(self, sample: int) -> np.ndarray:
        """Array of one sample; a new copy."""
        array = np.empty(self.shape, self.dtype)
        data = array.reshape(-1).view(np.uint8).data
        offset = sample * self.nbytes
        while data:
            count = os.preadv(self._file, [data], offset)
            if count == 0:
                raise EOFError(f"{self.path}: sample {sample} was not written")
            data, offset = data[count:], offset + count
        return array

    def free(self) -> None:
        """Close and delete the file."""
        os.close(self._file)
        self.path.unlink()


class Spill:
    """A temporary folder of spilled values, deleted on leaving the ``with`` block, also after an error.

    A value is an array or a tuple of values; ``flow`` tells versions of one variable apart.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="tvm_qfp8-", dir=folder)
        self._tensors: dict[tuple[str, str], Any] = {}
        self._files = 0

    def __enter__(self) -> Spill:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Delete all values and the folder."""
        for name, flow in list(self._tensors):
            self.free(name, flow)
        self._temporary.cleanup()

    def _create(self, spec: Spec) -> Any:
        if isinstance(spec, tuple):
            return tuple(self._create(part) for part in spec)
        self._files += 1
        return SpilledTensor(Path(self._temporary.name) / f"{self._files}.bin", spec)

    def create(self, name: str, flow: str, spec: Spec) -> None:
        """Make room for a value; it is then written sample by sample."""
        self._tensors[name, flow] = self._create(spec)

    def write(self, name: str, flow: str, sample: int, value: Any) -> None:
        """Store one sample's value."""
        for tensor, array in zip(_leaves(self._tensors[name, flow]), _leaves(value), strict=True):
            tensor.write(sample, array)

    def read(self, name: str, flow: str, sample: int) -> Any:
        """One sample's value, as it was written."""
        return _read(self._tensors[name, flow], sample)

    def has(self, name: str, flow: str) -> bool:
        """Whether a value is stored."""
        return (name, flow) in self._tensors

    def free(self, name: str, flow: str) -> None:
        """Delete a value of all samples."""
        for tensor in _leaves(self._tensors.pop((name, flow))):
            tensor.free()


def _leaves(value: Any) -> list[Any]:
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, tuple) else [value]


def _read(tensor: Any, sample: int) -> Any:
    return tuple(_read(part, sample) for part in tensor) if isinstance(tensor, tuple) else tensor.read(sample)
