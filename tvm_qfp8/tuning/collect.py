"""The workloads of a model: what ``compile`` asks schedules for."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tvm_qfp8.compiler import compile as compile_model
from tvm_qfp8.errors import ModelError
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.schedules import ScheduleChooser
from tvm_qfp8.tuning.workload import Workload


def recording(found: Counter[Workload]) -> ScheduleChooser:
    """A chooser of default schedules that counts what it is asked for."""

    def record(schedules: Any, isa: InstructionSet, shape: Any, threads: int) -> Any:
        found[Workload.of(schedules, isa, shape, threads)] += 1
        return schedules.default(isa, shape, threads)

    return record


def collect_workloads(mod: Any, target: Any, **options: Any) -> Counter[Workload]:
    """How often a model calls each kernel that can be tuned; takes the arguments of ``compile``.

    Raises
    ------
    ModelError
        No layer of the model can be tuned.
    """
    found: Counter[Workload] = Counter()
    compile_model(mod, target, tuning_logs=recording(found), **options)
    if not found:
        raise ModelError(
            "the model has no layer that can be tuned: only layers with quantized activations are; "
            "give calibration samples (--calibration)"
        )
    return found
