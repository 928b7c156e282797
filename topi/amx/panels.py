"""Weights of tiles: panels of ``width`` columns, stored as codes or as the bytes that are multiplied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.format import Layout, decode_grid
from tvm_qfp8.topi.amx.decode import decode_for_tiles
from tvm_qfp8.topi.amx.plan import TilePlan
from tvm_qfp8.topi.amx.tiles import BFLOAT16, ROWS
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import pack_panels
from tvm_qfp8.topi.prim_func import prefetch_run


def pack_tile_weights(plan: TilePlan, layout: Layout, codes: np.ndarray) -> np.ndarray:
    """Codes ``(columns, runs, run)`` -> panels as tiles read them, uint8 ``(panels, size)``."""
    padded = np.zeros((len(codes), plan.products, plan.steps), np.uint8)
    runs = padded[:, : plan.real_products].reshape(len(codes), plan.runs, -1)
    runs[:, :, : plan.run] = codes
    if plan.kind is not BFLOAT16:
        padded = decode_grid(padded, layout).astype(np.int8).view(np.uint8)
    panels = pack_panels(padded.reshape(len(codes), -1), plan.registers.width, plan.kind.pair)
    return panels.reshape(len(panels), -1)


@dataclass(frozen=True)
class TilePanels:
    """Packed weights of a layer as a kernel reads them."""

    isa: InstructionSet
    plan: TilePlan
    layout: Layout
    columns: int

    @property
    def count(self) -> int:
        return -(-self.columns // self.plan.registers.width)

    @property
    def valid(self) -> list[int]:
        """Real columns of each vector of a panel; fewer than the lanes only where there are fewer than a panel's."""
        width = self.plan.registers.width
        return [min(ROWS, self.columns - at) for at in range(0, min(width, self.columns), ROWS)]

    def prepare(self, packed, panel, reduction) -> tuple:
        """(operands, index) of a panel's weights for one block of the reduction."""
        plan, kind = self.plan, self.plan.kind
        size = plan.block * plan.steps * plan.registers.width
        start = T.bind((panel * plan.blocks + reduction) * size)
        if kind is not BFLOAT16:
            return packed, start
        prefetch_run(packed, start + size, size)
        weights = T.alloc_buffer((size,), kind.dtype, align=64)
        decode_for_tiles(self.isa, kind, self.layout, packed, start, weights, 0, size)
        return weights, 0

    def tiles(self, prepared: tuple, index) -> Callable:
        """Where the tiles of one product of the block lie."""
        plan, width = self.plan, self.plan.registers.width
        weights, start = prepared
        at = start + index * (plan.steps * width)
        return lambda tile: (weights, at + tile * (ROWS * plan.kind.pair), width * plan.kind.pair)
