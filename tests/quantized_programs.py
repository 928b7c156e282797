"""Small quantized Relax programs that several tests build, compile and run."""

from __future__ import annotations

import platform

import numpy as np
import pytest
import tvm
from tvm import relax

from tvm_qfp8.code_generation import generate_code
from tvm_qfp8.cpu_features import missing_features, reported_features, used_features
from tvm_qfp8.format import get_layout
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.lower_groups import LowerGroups
from tvm_qfp8.relay_passes.quantize_linear import codes_constant
from tvm_qfp8.relay_passes.schedule_rest import ScheduleRest
from tvm_qfp8.targets import cpu_features, parse_target
from tvm_qfp8.targets import isa as isa_of
from tvm_qfp8.topi import reference
from tvm_qfp8.topi.isa import instruction_set
from tvm_qfp8.topi.static_memory import StaticMemory

TARGETS = {"sse2": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}
"""A target for each instruction set of x86 whose kernels multiply vectors."""

TILES = "llvm -mcpu=x86-64-v4 -mattr=+avx512vbmi,+avx512vnni,+amx-tile,+amx-int8,+amx-bf16"
"""A target with tile registers (AMX)."""


def machine_runs(name: str) -> bool:
    """Whether this CPU runs code for one of ``TARGETS``, or for another target."""
    features = used_features(parse_target(TARGETS.get(name, name)))
    return platform.machine() == "x86_64" and not missing_features(reported_features("x86_64", features))


WITHOUT_TILES = next((target for name, target in reversed(TARGETS.items()) if machine_runs(name)), "native")
"""This machine's best instruction set whose kernels multiply vectors, not matrices."""


_RUNS = [name for name in TARGETS if machine_runs(name)]
RUNS = [
    pytest.param(name, marks=[] if name in (_RUNS[0], _RUNS[-1]) else pytest.mark.slow, id=name)
    for name in _RUNS
]
"""Those of ``TARGETS`` that this CPU runs; between the shortest registers and the longest they are slow tests."""


def program(inputs, emit):
    """``emit(builder, *inputs) -> expression``; inputs are (shape, layout name or None for float32)."""
    builder = relax.BlockBuilder()
    variables = [
        relax.Var(f"x{i}", relax.TensorType(shape, get_layout(layout).ir_dtype if layout else "float32"))
        for i, (shape, layout) in enumerate(inputs)
    ]
    with builder.function("main", variables):
        with builder.dataflow():
            output = builder.emit_output(emit(builder, *variables))
        builder.emit_func_output(output)
    return builder.get()


def build(mod, target: str, threads: int = 1, memory: StaticMemory | None = None):
    """Write the kernels for a target and compile."""
    parsed = parse_target(target)
    with parsed:
        instructions = instruction_set(isa_of(parsed), cpu_features(parsed))
        mod = LowerGroups(instructions, threads, memory=memory)(mod)
        mod = ScheduleRest(instructions, threads)(relax.transform.LegalizeOps()(mod))
        return generate_code(mod, parsed)


def run(executable, *arrays: np.ndarray) -> list[np.ndarray]:
    """Call ``main`` on this machine."""
    result = relax.VirtualMachine(executable, tvm.cpu())["main"](*(tvm.runtime.tensor(a) for a in arrays))
    return [result.numpy()] if hasattr(result, "numpy") else [part.numpy() for part in result]


def random_codes(rng: np.random.Generator, shape) -> np.ndarray:
    """Any codes, NaN's among them (kernels read it as zero)."""
    return rng.integers(0, 256, shape, dtype=np.uint8)


def dense_program(rows: int, columns: int, depth: int, layout: str, weight_layout: str = "E2M5") -> tuple:
    """(program of a dense layer, its codes, what its twin gives)."""
    rng = np.random.default_rng(rows)
    weight, x = random_codes(rng, (columns, depth)), random_codes(rng, (rows, depth))
    a, bias = rng.random(columns, np.float32) * 1e-4, rng.standard_normal(columns, np.float32)

    def emit(_builder, q):
        return qfp8_ops.matmul(q, codes_constant(weight, weight_layout), relax.const(a), relax.const(bias))

    sums = reference.matmul(x, weight, get_layout(layout), get_layout(weight_layout))
    return program([((rows, depth), layout)], emit), x, reference.scale_and_bias(sums, a, bias)
