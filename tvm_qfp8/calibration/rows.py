"""What is known of an activation's rows (tokens or pixels) when it is decided how they are rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Protocol

import numpy as np

SOME_ROWS = 1024
"""On which candidates are compared; all would take long and say the same."""


class Rows(Protocol):
    """Rows ``(rows, channels)``, float32, of samples."""

    @property
    def largest(self) -> np.ndarray:
        """The largest magnitude of each channel in all rows."""

    @property
    def some(self) -> list[np.ndarray]:
        """Some rows of each sample."""

    def all(self) -> Iterable[np.ndarray]:
        """As many rows of each sample as there are."""


class StoredRows:
    """Rows that are read again for each pass over them."""

    def __init__(self, read: Callable[[int], np.ndarray], samples: int) -> None:
        self._read, self._samples = read, samples

    @cached_property
    def _kept(self) -> KeptRows:
        kept = KeptRows(self._samples)
        for part in self.all():
            kept.add(part)
        return kept

    @property
    def largest(self) -> np.ndarray:
        return self._kept.largest

    @property
    def some(self) -> list[np.ndarray]:
        return self._kept.some

    def all(self) -> Iterable[np.ndarray]:
        return map(self._read, range(self._samples))


class KeptRows:
    """The rows of samples that are seen once: some of each are kept, and what is largest in any."""

    def __init__(self, samples: int) -> None:
        self._most = -(-SOME_ROWS // samples)
        self._largest: np.ndarray = np.zeros(1, np.float32)
        self._some: list[np.ndarray] = []

    @property
    def largest(self) -> np.ndarray:
        return self._largest

    @property
    def some(self) -> list[np.ndarray]:
        return self._some

    def add(self, part: np.ndarray) -> None:
        """The rows of one sample."""
        self._largest = np.maximum(self._largest, np.abs(part).max(axis=0, initial=0.0))
        self._some.append(np.ascontiguousarray(part[:: max(1, len(part) // self._most)]))

    def all(self) -> Iterable[np.ndarray]:
        return self._some
