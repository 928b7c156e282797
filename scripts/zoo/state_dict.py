"""Reads a state dict as torch wrote it before version 1.6, without torch and without running its pickle's code.

The file is a sequence of pickles (magic number, protocol, system, state dict, storage keys), then each storage as its
number of elements (int64) and the elements. Only dense tensors in ordered dicts are built; any other class is refused.
"""

from __future__ import annotations

import collections
import io
import pickle
from typing import Any, NamedTuple

import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {"FloatStorage": np.float32, "LongStorage": np.int64}


class StateDictError(ValueError):
    """The file is no state dict of dense tensors."""


class _Tensor(NamedTuple):
    storage: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, storage: np.ndarray) -> np.ndarray:
        steps = [stride * storage.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(storage[self.offset :], self.shape, steps).copy()


def _tensor(storage: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> _Tensor:
    return _Tensor(storage, offset, shape, strides)


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.dtypes: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise StateDictError(f"the file holds {module}.{name}; only dense float32 and int64 tensors are read")

    def persistent_load(self, pid: Any) -> str:
        _, dtype, key, *_ = pid
        self.dtypes[key] = dtype
        return key


def read_state_dict(data: bytes) -> dict[str, np.ndarray]:
    """Arrays by name from the bytes of a ``.pth`` file.

    Raises
    ------
    StateDictError
        If it is no such file, or holds anything but dense float32 or int64 tensors.
    """
    stream = io.BytesIO(data)
    try:
        if _Unpickler(stream).load() != _MAGIC:
            raise StateDictError("the file does not start with the magic number of a torch state dict")
    except pickle.UnpicklingError as error:
        raise StateDictError(f"the file is no torch state dict: {error}") from error
    for _ in ("protocol", "system"):
        _Unpickler(stream).load()
    unpickler = _Unpickler(stream)
    tensors: dict[str, _Tensor] = unpickler.load()
    storages = {}
    for key in _Unpickler(stream).load():
        dtype = np.dtype(unpickler.dtypes[key])
        count = int.from_bytes(stream.read(8), "little")
        storages[key] = np.frombuffer(stream.read(count * dtype.itemsize), dtype)
    return {name: tensor.array(storages[tensor.storage]) for name, tensor in tensors.items()}
