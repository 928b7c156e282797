"""Building and timing candidates on this machine, in processes that may crash or hang without harm.

MetaSchedule's ``LocalBuilder`` and ``LocalRunner`` do the work. Each candidate is compiled and linked in one worker
and timed in another; a worker that dies or takes too long is replaced, and the candidate counts as failed.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import tvm
from tvm.s_tir import meta_schedule as ms
from tvm.target import Target

from tvm_qfp8 import tvm_fixes
from tvm_qfp8.code_generation import generate_code
from tvm_qfp8.linker import linker

BUILD_SECONDS = 60.0
RUN_SECONDS = 20.0

EVALUATOR = ms.runner.EvaluatorConfig(number=1, repeat=12, min_repeat_ms=8, enable_cpu_cache_flush=False)
KEPT_REPEATS = 3
"""The fastest repeats count: what else runs on the machine can only slow a repeat down."""


LOST: list[float] = []
"""No verdict on a kernel: what should have timed it is gone."""


class Measurer(Protocol):
    """Times kernels: one list of seconds per kernel, None for one that failed, ``LOST`` for one without verdict."""

    batch: int
    """Kernels worth handing over at once."""

    def measure(self, kernels: Sequence[tvm.IRModule], rounds: int = 1) -> list[list[float] | None]:
        """Time every kernel, ``rounds`` times in turn."""


def fastest(times: Sequence[float]) -> list[float] | None:
    """The repeats that count; None where there are none."""
    return sorted(float(seconds) for seconds in times)[:KEPT_REPEATS] or None


def build_kernel(mod: tvm.IRModule, target: Target, _params: Any) -> Any:
    """What a builder's worker runs first."""
    return generate_code(mod, target)


def export_kernel(executable: Any, *, target: dict[str, Any]) -> str:
    """What a builder's worker runs second: links the kernel; the path of the shared library."""
    path = Path(tempfile.mkdtemp(prefix="tvm_qfp8_tune_")) / "kernel.so"
    executable.export_library(str(path), fcompile=linker(Target(target)))
    return str(path)


def make_builder(target: Target, workers: int) -> ms.builder.LocalBuilder:
    """A builder for any CPU target."""
    return ms.builder.LocalBuilder(
        max_workers=workers,
        timeout_sec=BUILD_SECONDS,
        f_build=build_kernel,
        f_export=functools.partial(export_kernel, target=dict(target.export())),
        initializer=tvm_fixes.apply,
    )


def build_all(
    builder: ms.builder.LocalBuilder, target: Target, kernels: Sequence[tvm.IRModule]
) -> list[ms.runner.RunnerInput | None]:
    """Build kernels; None for each that cannot be built."""
    inputs = [ms.builder.BuilderInput(kernel, target) for kernel in kernels]
    return [
        None
        if result.artifact_path is None
        else ms.runner.RunnerInput(
            result.artifact_path, "cpu", ms.arg_info.ArgInfo.from_entry_func(kernel, remove_preproc=True)
        )
        for kernel, result in zip(kernels, builder.build(inputs), strict=True)
    ]


def remove_artifact(built: ms.runner.RunnerInput | None) -> None:
    """Delete what a builder left on disk."""
    if built is not None:
        shutil.rmtree(Path(str(built.artifact_path)).parent, ignore_errors=True)


class LocalMeasurer:
    """Builds and times on this machine, one kernel at a time."""

    batch = 32

    def __init__(self, target: Target, workers: int) -> None:
        self.target = target
        self._builder = make_builder(target, workers)
        self._runner = ms.runner.LocalRunner(
            timeout_sec=RUN_SECONDS, evaluator_config=EVALUATOR, initializer=tvm_fixes.apply
        )

    def measure(self, kernels: Sequence[tvm.IRModule], rounds: int = 1) -> list[list[float] | None]:
        built = build_all(self._builder, self.target, kernels)
        try:
            turns = [[self._time(kernel) for kernel in built] for _ in range(rounds)]
            return [fastest([s for turn in turns for s in turn[i]]) for i in range(len(built))]
        finally:
            for kernel in built:
                remove_artifact(kernel)

    def _time(self, built: ms.runner.RunnerInput | None) -> list[float]:
        if built is None:
            return []
        return list(self._runner.run([built])[0].result().run_secs or [])
