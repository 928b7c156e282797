"""Linear resizing of images: along the columns of an input row first, then between two such rows.

Each output value lies between two input pixels of each axis; which ones, and how near to each, is found when the kernel
is written (``linear_taps``). A row that is resized along its columns serves all output rows that lie next to it. With
``w`` and ``v`` the weights of the left or upper and of the other pixel::

    fl32(fl32(a * w) + fl32(b * v))
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.float_contract import add, bind, lanes_of, mul
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import balanced_blocks, overlapped_start
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, load, store, vector_runs
from tvm_qfp8.topi.rows import MIN_PARALLEL_ELEMENTS, like_scalar
from tvm_qfp8.topi.sharing import rows_of_block

COORDINATES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
"""The modes of ONNX's Resize that ``linear_taps`` knows."""


@dataclass(frozen=True)
class ResizeShape:
    """``outer`` images or planes of ``height x width`` pixels of ``inner`` values; to the size ``out``."""

    outer: int
    height: int
    width: int
    inner: int
    out: tuple[int, int]
    coordinates: str

    def taps(self) -> tuple[np.ndarray, np.ndarray]:
        """``linear_taps`` of the rows, then of the columns, each ``(out rows + out columns, 2)``."""
        both = [
            linear_taps(size, out, self.coordinates)
            for size, out in zip((self.height, self.width), self.out, strict=True)
        ]
        places, weights = (np.concatenate([found[part] for found in both]) for part in range(2))
        return places, weights


def linear_taps(size: int, out: int, coordinates: str) -> tuple[np.ndarray, np.ndarray]:
    """Neighbouring places int32 ``(out, 2)`` and their weights float32 ``(out, 2)`` along an axis.

    Beyond the first and last pixel these are repeated.
    """
    at = np.arange(out, dtype=np.float64)
    if coordinates == "align_corners":
        at *= (size - 1) / max(1, out - 1)
    elif coordinates == "asymmetric":
        at *= size / out
    elif coordinates == "pytorch_half_pixel" and out == 1:
        at *= 0
    else:
        at = (at + 0.5) * (size / out) - 0.5
    low = np.floor(at)
    places = np.clip(np.stack([low, low + 1], axis=1), 0, size - 1).astype(np.int32)
    return places, np.stack([1 - (at - low), at - low], axis=1).astype(np.float32)


def resize_prim_func(
    isa: InstructionSet, threads: int, shape: ResizeShape, x_shape: tuple[int, ...], y_shape: tuple[int, ...]
) -> tirx.PrimFunc:
    """``(x, places, weights, y) -> None`` on float32 images, with the arrays of ``ResizeShape.taps``."""
    out_h, out_w = shape.out
    row_size = out_w * shape.inner
    parallel = threads > 1 and shape.outer * out_h * row_size >= MIN_PARALLEL_ELEMENTS
    block, blocks = balanced_blocks(out_h, rows_of_block(out_h, threads) if parallel else out_h)

    def body(x, places, weights, y) -> None:
        def between(buffer, starts: list, tap, offset, lanes: int):
            """What lies between two vectors, by the weights of a tap."""
            left, right = (
                bind(mul(values, like_scalar(bind(load(weights, tap * 2 + side, 1)), lanes_of(values))))
                for side, values in enumerate(bind(load(buffer, start + offset, lanes)) for start in starts)
            )
            return bind(add(left, right))

        def along_columns(source, rows, slot) -> None:
            with T.serial(0, out_w) as column:
                tap = T.bind(out_h + column)
                starts = [T.bind(source + load(places, tap * 2 + side, 1) * shape.inner) for side in range(2)]
                target = T.bind(slot * row_size + column * shape.inner)
                vector_runs(
                    shape.inner,
                    isa.lanes,
                    lambda at, lanes: store(rows, target + at, between(x, starts, tap, at, lanes), lanes),
                )

        def rows_of_block(outer, first) -> None:
            # Two neighbouring input rows, an odd and an even one, resized along their columns.
            rows = T.alloc_buffer((2 * row_size,), "float32", align=64)
            held = T.alloc_buffer((2,), "int32", scope="local")
            for slot in range(2):
                store(held, slot, tirx.const(-1, "int32"), 1)
            with T.serial(0, block) as index:
                row = T.bind(first + index)
                starts = []
                for side in range(2):
                    place = T.bind(load(places, row * 2 + side, 1))
                    slot = T.bind(place % 2)
                    with T.If(load(held, slot, 1) != place):
                        with T.Then():
                            source = T.bind((outer * shape.height + place) * (shape.width * shape.inner))
                            along_columns(source, rows, slot)
                            store(held, slot, place, 1)
                    starts.append(T.bind(slot * row_size))
                target = T.bind((outer * out_h + row) * row_size)
                vector_runs(
                    row_size,
                    isa.lanes,
                    lambda at, lanes: store(y, target + at, between(rows, starts, row, at, lanes), lanes),
                )

        with (T.parallel if parallel else T.serial)(0, shape.outer * blocks) as index:
            outer = T.bind(index // blocks)
            rows_of_block(outer, overlapped_start(index - outer * blocks, block, out_h))

    taps = out_h + out_w, 2
    arguments = [(x_shape, "float32"), (taps, "int32"), (taps, "float32"), (y_shape, "float32")]
    return build_prim_func("resize", [TensorSpec(*argument) for argument in arguments], body)
