"""Embedding tables: which are quantized, and what a look-up gives then."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from tvm_qfp8.calibration.evaluate import Name, Program, Step
from tvm_qfp8.calibration.linear import skipped_by_name
from tvm_qfp8.calibration.operators import TABLE
from tvm_qfp8.quantize import QTensor, quantize

SMALLEST_TABLE = 4096
"""Elements; a smaller table is not worth its scales."""


def quantized_embeddings(program: Program, skip: Iterable[str] = ()) -> dict[str, QTensor]:
    """By variable name, the constant float32 tables ``(rows, width)`` that ``take`` reads rows of, in E2M5 per row."""
    patterns = tuple(skip)
    return {
        step.name: quantize(step.arguments[0], axis=0, layout="E2M5", bias="mse")
        for step in program.steps
        if _is_embedding(step) and skipped_by_name(step, patterns) is None
    }


def embedding_tables(program: Program) -> dict[str, np.ndarray]:
    """By variable name, all constant float32 tables ``(rows, width)`` that ``take`` reads rows of."""
    return {step.name: step.arguments[0] for step in program.steps if _is_look_up(step)}


def _is_look_up(step: Step) -> bool:
    if step.operator != "relax.take" or not isinstance(step.arguments[1], Name):
        return False
    table = step.arguments[0]
    is_table = isinstance(table, np.ndarray) and table.ndim == 2 and table.dtype == np.float32
    return is_table and step.attrs.axis == 0


def _is_embedding(step: Step) -> bool:
    if not _is_look_up(step):
        return False
    table = step.arguments[0]
    return table.size >= SMALLEST_TABLE and bool(np.isfinite(table).all())


def embedding_steps(
    program: Program, tables: Mapping[str, QTensor]
) -> dict[str, Callable[[Mapping[str, Any]], np.ndarray]]:
    """``run(values)`` by variable name: the look-up in the quantized table."""

    def look_up(step: Step) -> Callable[[Mapping[str, Any]], np.ndarray]:
        table = tables[step.name].dequantize()
        return lambda values: np.asarray(
            TABLE["relax.take"](step.attrs, table, values[step.arguments[1].name])
        )

    return {step.name: look_up(step) for step in program.steps if step.name in tables}
