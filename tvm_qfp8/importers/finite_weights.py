"""Weights that are not numbers: a layer on integers would hide them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tvm_qfp8.errors import ModelError


def check_finite(weights: Iterable[tuple[str, np.ndarray]], infinity_allowed: bool = False) -> None:
    """Refuse NaN and infinity in named float arrays.

    Parameters
    ----------
    infinity_allowed : bool
        For constants that may be masks, in which infinity has a meaning.

    Raises
    ------
    ModelError
        Names the tensor and the index of the first bad element.
    """
    for name, array in weights:
        if array.dtype.kind != "f":
            continue
        bad = np.isnan(array) if infinity_allowed else ~np.isfinite(array)
        if bad.any():
            index = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ModelError(f"weight {name!r} is {array[index]} at index {index}; the file is damaged")
