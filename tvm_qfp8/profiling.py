"""Where a module's time goes: every kernel call of one run, timed by the virtual machine's instrument."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_qfp8.errors import ModelError
from tvm_qfp8.kernel_calls import layers_of
from tvm_qfp8.runtime import CompiledModule


@dataclass(frozen=True)
class KernelTime:
    """One kernel call of a run."""

    kernel: str
    """The members of the kernel, such as ``conv2d_add_clip_encode``; the builder numbers equal names."""
    layer: str
    """The layer that the kernel computes, with what is fused to it: a name of the report, or of a tensor on the way."""
    microseconds: float
    """Median over the runs; the timer itself adds about a microsecond."""
    bytes: int
    """Of all its arguments and results: what it must read and write at least once."""
    shapes: list[str]
    """Dtype and shape of each argument, results last."""


def profile(module: CompiledModule, inputs: Mapping[str, np.ndarray], runs: int = 20) -> list[KernelTime]:
    """Time the kernel calls of ``module`` on named arrays, in the order in which they run.

    Raises
    ------
    InputError
        As ``CompiledModule.run``.
    ModelError
        The module runs on a GPU, where kernels are one launch.
    """
    if module.device.type != "cpu":
        raise ModelError(
            "times of single kernels are for modules on CPUs: a GPU runs them as one graph; "
            "NVIDIA's profiler shows them by name: nsys profile --cuda-graph-trace=node tvm-qfp8 bench MODULE.so"
        )
    calls: list[tuple[str, list[Any]]] = []
    seconds: list[list[float]] = []
    started = 0.0
    position = 0

    def instrument(_function, name: str, before_run: bool, _result, *arguments) -> int:
        nonlocal started, position
        if name.startswith("vm."):
            return 0
        if before_run:
            if position == len(calls):
                calls.append((name, [a for a in arguments if hasattr(a, "shape")]))
                seconds.append([])
            started = time.perf_counter()
        else:
            seconds[position].append(time.perf_counter() - started)
            position += 1
        return 0

    machine = module.virtual_machine
    module.run(inputs)
    machine.set_instrument(instrument)
    try:
        for _ in range(runs):
            position = 0
            module.run(inputs)
    finally:
        machine.set_instrument(lambda *_: 0)
    layers = layers_of(module.calls, [name for name, _ in calls])
    return [
        KernelTime(name, layer, statistics.median(times) * 1e6, *_traffic(tensors))
        for (name, tensors), layer, times in zip(calls, layers, seconds, strict=True)
    ]


def _traffic(tensors: list[Any]) -> tuple[int, list[str]]:
    total, shapes = 0, []
    for tensor in tensors:
        extents = tuple(int(extent) for extent in tensor.shape)
        total += int(np.prod(extents, dtype=np.int64)) * np.dtype(str(tensor.dtype)).itemsize
        shapes.append(f"{tensor.dtype}[{','.join(map(str, extents))}]")
    return total, shapes
