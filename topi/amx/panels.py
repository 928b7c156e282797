"""Weights of tiles: panels of ``width`` columns, stored as codes or as the bytes that are multiplied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.format import Layout, decode_grid
from tvm_qfp8.topi.amx.decode import PACKED, decode_for_tiles
from tvm_qfp8.topi.amx.plan import RESIDENT_BYTES, TilePlan
from tvm_qfp8.topi.amx.tiles import BFLOAT16, ROWS, tile_buffer
from tvm_qfp8.topi.panels import pack_panels
from tvm_qfp8.topi.prim_func import prefetch_run

PIECE = 64
"""Codes that are decoded at once, and bytes of a cache line."""


def pack_tile_weights(plan: TilePlan, layout: Layout, codes: np.ndarray) -> np.ndarray:
    """Codes ``(columns, runs, run)`` -> panels as tiles read them, uint8 ``(panels, size)``.

    The columns of a lone panel's vectors are those of ``WeightPanels.starts``.
    """
    if ROWS < len(codes) < plan.registers.width:
        codes = np.concatenate(
            [codes[at : at + ROWS] for at in WeightPanels(plan, len(codes), layout).starts]
        )
    padded = np.zeros((len(codes), plan.products, plan.steps), np.uint8)
    runs = padded[:, : plan.real_products].reshape(len(codes), plan.runs, -1)
    runs[:, :, : plan.run] = codes
    if plan.kind is not BFLOAT16:
        padded = decode_grid(padded, layout).astype(np.int8).view(np.uint8)
    panels = pack_panels(padded.reshape(len(codes), -1), plan.registers.width, plan.kind.pair)
    if plan.kind is BFLOAT16:
        panels = panels.reshape(-1, PIECE)[:, PACKED].reshape(len(panels), -1)
    return panels.reshape(len(panels), -1)


@dataclass(frozen=True)
class Panels(ABC):
    """The right operand as ``emit_sums`` reads it, in panels of columns."""

    plan: TilePlan
    columns: int

    @property
    def count(self) -> int:
        return -(-self.columns // self.plan.registers.width)

    @property
    def valid(self) -> list[int]:
        """Real columns of each vector of a panel; fewer than the lanes only where there are fewer than a panel's."""
        return [min(ROWS, self.columns - at) for at in self.starts]

    @property
    def starts(self) -> list[int]:
        """First column of each vector of a panel, counted from the panel's."""
        return list(range(0, min(self.plan.registers.width, self.columns), ROWS))

    @property
    def unit(self) -> int:
        """Elements of a panel for one block of the reduction; units follow each other."""
        return self.plan.block * self.plan.steps * self.plan.registers.width

    @property
    def resident(self) -> bool:
        """All fit the first-level cache, beside one block of activations: every block walks all panels."""
        size = self.count * self.unit * self.plan.kind.element_bytes
        return self.plan.blocks * self.plan.parts == 1 and size <= RESIDENT_BYTES

    @abstractmethod
    def start(self, packed, first_panel, count):
        """The buffer that tiles are read from."""

    @abstractmethod
    def next_slice(self, packed, buffer, first_panel, unit, part, parts: int) -> None:
        """Make a part of the unit that is read after ``unit``, counted from ``first_panel``."""

    @abstractmethod
    def place(self, first_panel, unit):
        """Which unit of the buffer ``unit`` is."""

    def tiles(self, buffer, first_panel, unit, index) -> Callable:
        """Where the tiles of one product of a unit lie."""
        steps, width, pair = self.plan.steps, self.plan.registers.width, self.plan.kind.pair
        at = T.bind(self.place(first_panel, unit) * self.unit + index * (steps * width))
        return lambda tile: (buffer, at + tile * (ROWS * pair), width * pair)


@dataclass(frozen=True)
class WeightPanels(Panels):
    """Packed weights of a layer, decoded while they are needed."""

    layout: Layout

    @property
    def starts(self) -> list[int]:
        """As for all panels, but a vector that is not full overlaps the one before it."""
        return [min(at, max(0, self.columns - ROWS)) for at in super().starts]

    def start(self, packed, first_panel, count):
        """Two units, the first of them decoded, or all."""
        if self.plan.kind is not BFLOAT16:
            return packed
        source = first_panel * (self.plan.blocks * self.unit)
        if self.resident:
            weights = tile_buffer(self.count * self.unit, self.plan.kind.dtype)
            with T.serial(0, count) as panel:
                at = T.bind(panel * self.unit)
                self._decode(packed, source + at, weights, at, self.unit)
            return weights
        weights = tile_buffer(2 * self.unit, self.plan.kind.dtype)
        self._decode(packed, source, weights, 0, self.unit)
        return weights

    def next_slice(self, packed, buffer, first_panel, unit, part, parts: int) -> None:
        """Decode a part of the next unit, and fetch what comes after it."""
        if self.resident:
            return
        pieces = self.unit // PIECE
        following = T.bind(
            tirx.min(first_panel * self.plan.blocks + unit + 1, self.count * self.plan.blocks - 1)
        )
        source = T.bind(following * self.unit)
        first = T.bind(part * pieces // parts)
        with T.serial(0, T.bind((part + 1) * pieces // parts) - first) as i:
            at = T.bind((first + i) * PIECE)
            if self.plan.kind is not BFLOAT16:
                prefetch_run(packed, source + at, PIECE)
                return
            prefetch_run(packed, source + self.unit + at, PIECE)
            target = T.bind((unit + 1) % 2 * self.unit + at)
            self._decode(packed, source + at, buffer, target, PIECE)

    def _decode(self, packed, source, target, target_at, length: int) -> None:
        decode_for_tiles(self.plan.kind, self.layout, packed, source, target, target_at, length, packed=True)

    def place(self, first_panel, unit):
        if self.plan.kind is not BFLOAT16:
            return first_panel * self.plan.blocks + unit
        return unit if self.resident else unit % 2
