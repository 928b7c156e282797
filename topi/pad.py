"""Padding of images by their own pixels: reflected, replicated or from the other side; whole runs are copied.

TVM's own kernels compute the place of every element that they read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, load, store, vector_runs
from tvm_qfp8.topi.rows import MIN_PARALLEL_ELEMENTS, for_each_row

MODES: dict[str, Literal["reflect", "edge", "wrap"]] = {
    "reflect": "reflect",
    "replicate": "edge",
    "circular": "wrap",
}
"""Of ``relax.nn.pad``, as NumPy calls them."""


def places(extents: Sequence[int], widths: tuple[int, int, int, int], mode: str) -> np.ndarray:
    """The line of x that each line of the result is, then the column of each column, int32.

    Parameters
    ----------
    extents : (height, width)
    widths : (top, left, bottom, right)
    mode : str
        Of ``MODES``.
    """
    axes = zip(extents, widths[:2], widths[2:], strict=True)
    of_axes = [np.pad(np.arange(extent), (before, after), MODES[mode]) for extent, before, after in axes]
    return np.concatenate(of_axes).astype(np.int32)


def pad_prim_func(
    isa: InstructionSet, threads: int, source: TensorSpec, widths: tuple[int, int, int, int]
) -> tirx.PrimFunc:
    """``(x, places, result) -> None``: x ``(batch, height, width, channels)`` of any dtype.

    Parameters
    ----------
    widths : (top, left, bottom, right)
        Not negative.
    """
    batch, height, width, channels = source.shape
    top, left, bottom, right = widths
    lines, columns = height + top + bottom, width + left + right
    bits = tirx.const(0, source.dtype).ty.dtype.bits
    lanes = isa.lanes * 32 // max(8, bits)

    def body(x, places, result) -> None:
        def copy(start, target, length: int) -> None:
            def run(offset, count: int) -> None:
                store(result, target + offset, load(x, start + offset, count), count)

            vector_runs(length, lanes, run)

        def line(row) -> None:
            image, index = T.bind(row // lines), T.bind(row % lines)
            start = T.bind((image * height + load(places, index, 1)) * width * channels)
            target = T.bind(row * columns * channels)
            copy(start, target + left * channels, width * channels)
            for first, count in ((0, left), (left + width, right)):
                if count:
                    with T.serial(0, count) as border:
                        column = T.bind(load(places, lines + first + border, 1))
                        copy(start + column * channels, target + (first + border) * channels, channels)

        rows, length = batch * lines, columns * channels
        for_each_row(rows, length, threads if rows * length >= MIN_PARALLEL_ELEMENTS else 1, line)

    padded = TensorSpec((batch, lines, columns, channels), source.dtype)
    return build_prim_func("pad", [source, TensorSpec((lines + columns,), "int32"), padded], body)
