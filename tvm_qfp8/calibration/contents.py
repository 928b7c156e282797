"""What tells arrays of equal bytes from others, without keeping the bytes."""

from __future__ import annotations

import hashlib

import numpy as np

Contents = tuple[str, tuple[int, ...], bytes]


def contents(array: np.ndarray) -> Contents:
    """Dtype, shape and a digest of the bytes: equal for equal arrays."""
    return str(array.dtype), array.shape, hashlib.sha1(array.tobytes(), usedforsecurity=False).digest()
