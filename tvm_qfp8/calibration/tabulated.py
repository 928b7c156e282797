"""Nonlinear steps as their tables: what the quantized flow computes, so that biases are corrected for it too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tvm_qfp8.calibration.evaluate import Name, Program, TensorSpec
from tvm_qfp8.tables import Table, build_table
from tvm_qfp8.tables.operators import function_of

Run = Callable[[Mapping[str, Any]], np.ndarray]


def tabulated_steps(program: Program, max_error: float) -> dict[str, Run]:
    """``run(values)`` by variable name, for every float32 step that ``Interpolate`` turns into a table."""
    found: dict[str, Run] = {}
    for step in program.steps:
        function = function_of(step.operator, step.arguments)
        source = step.arguments[0] if step.arguments else None
        is_float32 = isinstance(step.spec, TensorSpec) and step.spec.dtype == "float32"
        if function is not None and is_float32 and isinstance(source, Name):
            found[step.name] = _look_up(build_table(function, max_error=max_error), source.name)
    return found


def _look_up(table: Table, source: str) -> Run:
    return lambda values: np.asarray(table(values[source]))
