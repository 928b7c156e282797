"""Where the tiles of Winograd's algorithm lie: rows of them, counted over all phases of all images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.winograd_plan import WinogradPlan


@dataclass(frozen=True)
class TileRow:
    """Its image, the first row and column of the image that its phase reads, its first row there."""

    image: Any
    first_row: Any
    first_column: Any
    top: Any


def row_of_tiles(plan: WinogradPlan, index) -> TileRow:
    """The last row of a phase may overlap the one before it."""
    shape, outputs, (step_h, step_w) = plan.shape, plan.tiling.outputs, plan.shape.dilation
    images = shape.batch * plan.phases
    part = T.bind(tirx.floordiv(index, plan.tiles_high)) if images > 1 else 0
    image, phase = (part, 0) if plan.phases == 1 else (part // plan.phases, part % plan.phases)
    first_row, first_column = phase // step_w, phase % step_w
    high = _every(shape.out_height, step_h, first_row)
    top = T.bind(tirx.min((index - part * plan.tiles_high) * outputs, high - outputs))
    return TileRow(image, first_row, first_column, top)


def left_of_tile(plan: WinogradPlan, row: TileRow, index):
    """The first column of outputs of a tile in its row, among those of the phase."""
    outputs = plan.tiling.outputs
    wide = _every(plan.shape.out_width, plan.shape.dilation[1], row.first_column)
    return tirx.min(index * outputs, wide - outputs)


def _every(extent: int, step: int, first):
    """How many of ``extent`` there are from ``first``, in steps."""
    return extent if step == 1 else tirx.floordiv(extent + step - 1 - first, step)
