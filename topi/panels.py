"""Weight panels and the decoding of codes into int16 scratch.

A weight matrix of ``columns`` output channels and ``depth`` reduction steps is stored, as codes, in panels of
``width`` columns: ``(panels, depth / pair, width, pair)``. That is the order in which the micro-kernel reads it,
and decoding keeps the order, so a panel is decoded into cache by one straight run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.format import Layout
from tvm_qfp8.topi.codec import decode_expr
from tvm_qfp8.topi.float_contract import with_lanes
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.prim_func import load, store, vector_runs


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def pack_panels(codes: np.ndarray, width: int, pair: int) -> np.ndarray:
    """Codes ``(columns, depth)`` -> panels ``(panels, depth / pair, width, pair)``, padded with code 0."""
    columns, depth = codes.shape
    padded = np.zeros((round_up(columns, width), round_up(depth, pair)), codes.dtype)
    padded[:columns, :depth] = codes
    panels = padded.reshape(-1, width, padded.shape[1] // pair, pair)
    return np.ascontiguousarray(panels.transpose(0, 2, 1, 3))


CHANNEL_PADDING = 16
"""Elements that a vector load may reach past the last channel."""


def pad_channels(values: np.ndarray) -> np.ndarray:
    """Per-channel float32 values, padded with zeros so that a vector may start at any channel."""
    padded = np.zeros(len(values) + CHANNEL_PADDING, np.float32)
    padded[: len(values)] = values
    return padded


def decode_run(
    isa: InstructionSet, layout: Layout, source, source_at, target, target_at, length: int
) -> None:
    """Decode ``length`` neighbouring codes into int16."""

    def emit(offset, lanes):
        codes = load(source, source_at + offset, lanes)
        store(target, target_at + offset, decode_expr(codes, layout, "int16"), lanes)

    vector_runs(length, 2 * isa.lanes, emit)


def zero_run(isa: InstructionSet, target, target_at, length: int) -> None:
    """Write ``length`` int16 zeros."""

    def emit(offset, lanes):
        store(target, target_at + offset, tirx.const(0, with_lanes("int16", lanes)), lanes)

    if length:
        vector_runs(length, 2 * isa.lanes, emit)


@dataclass(frozen=True)
class PanelShape:
    """``columns`` output channels by ``depth`` (a multiple of ``pair``), ``vectors`` int32 vectors a panel."""

    columns: int
    depth: int
    vectors: int
    weight: Layout


@dataclass(frozen=True)
class PanelWeights:
    """The weights of one panel as a micro-kernel sees them."""

    load: Callable
    """(step, vector) -> int16 vector of ``lanes * pair`` grid values."""
    column: Callable
    """(vector) -> index of its first output channel."""
    valid: list[int]
    """Real output channels in each vector; fewer than the lanes only at the end of the last panel."""


def for_each_panel(
    isa: InstructionSet,
    shape: PanelShape,
    panels,
    body: Callable,
    *,
    loop=T.serial,
    in_registers: bool = False,
) -> None:
    """Emit ``body(PanelWeights)`` for all panels.

    A panel is decoded into cache first, or vector by vector in registers where too few rows reuse it.
    """
    lanes, width = isa.lanes, shape.vectors * isa.lanes
    vector_codes = lanes * isa.pair

    def one_panel(panel, valid: list[int]) -> None:
        start = panel * (shape.depth * width)
        if in_registers:

            def load_weights(step, vector):
                codes = load(panels, start + step * (width * isa.pair) + vector * vector_codes, vector_codes)
                return T.bind(decode_expr(codes, shape.weight, "int16"))
        else:
            decoded = T.alloc_buffer((shape.depth * width,), "int16", align=64)
            decode_run(isa, shape.weight, panels, start, decoded, 0, shape.depth * width)

            def load_weights(step, vector):
                return T.bind(load(decoded, step * (width * isa.pair) + vector * vector_codes, vector_codes))

        body(PanelWeights(load_weights, lambda vector: panel * width + vector * lanes, valid))

    full, left = divmod(shape.columns, width)
    if full:
        with loop(0, full) as panel:
            one_panel(panel, [lanes] * shape.vectors)
    if left:
        one_panel(full, [min(lanes, left - at) for at in range(0, left, lanes)])
