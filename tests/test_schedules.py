"""Every schedule of a space gives the same bits as the default, and weights are packed to fit."""

import numpy as np
import pytest

from tvm_qfp8.format import get_layout
from tvm_qfp8.targets import cpu_features, isa, parse_target
from tvm_qfp8.topi.batch_matmul import BatchMatmulShape
from tvm_qfp8.topi.conv2d import ConvShape
from tvm_qfp8.topi.gemm import GemmShape
from tvm_qfp8.topi.isa import instruction_set
from tvm_qfp8.tuning.workload import Workload

E3M4, E2M5 = get_layout("E3M4"), get_layout("E2M5")


def conv(channels, out, kernel, stride, groups):
    padding = tuple(k // 2 for k in kernel) * 2
    return ConvShape(1, 9, 21, channels, out, kernel, stride, padding, (1, 1), groups, E3M4, E2M5)


SHAPES = {
    "few rows": ("gemm", GemmShape(3, 70, 37, E3M4, E2M5)),
    "some rows": ("gemm", GemmShape(13, 48, 64, E3M4, E2M5)),
    "many rows": ("gemm", GemmShape(300, 50, 65, E3M4, E2M5)),
    "convolution": ("conv2d", conv(12, 40, (3, 3), (1, 1), 1)),
    "grouped": ("conv2d", conv(12, 36, (3, 3), (2, 2), 3)),
    "depthwise": ("depthwise", conv(40, 40, (3, 3), (1, 1), 40)),
    "batch_matmul": ("batch_matmul", BatchMatmulShape(2, 20, 33, 17, E3M4, E3M4, True)),
}


def native_workload(family, shape, threads=1):
    target = parse_target("native")
    return Workload(family, shape, instruction_set(isa(target), cpu_features(target)), threads)


def run_schedule(workload, decisions):
    """The layer's output on fixed random codes and weights."""
    import tvm
    from tvm import relax

    from tvm_qfp8.code_generation import generate_code
    from tvm_qfp8.relay_passes.lower_groups import LowerGroups
    from tvm_qfp8.relay_passes.quantize_linear import codes_constant
    from tvm_qfp8.tuning import workload as module

    rng = np.random.default_rng(0)
    schedule = workload.schedules.from_decisions(decisions)
    original = module.codes_constant
    module.codes_constant = lambda codes, layout: codes_constant(
        rng.integers(0, 256, codes.shape, dtype=np.uint8), layout
    )
    try:
        layer = module.quantized_layer(workload)
    finally:
        module.codes_constant = original
    lowered = LowerGroups(workload.isa, workload.threads, choose=lambda *_: schedule)(layer)
    executable = generate_code(lowered, parse_target("native"))
    inputs = [
        tvm.runtime.tensor(rng.integers(0, 256, [int(d) for d in p.ty.shape], dtype=np.uint8))
        for p in layer["main"].params
    ]
    return relax.VirtualMachine(executable, tvm.cpu())["main"](*inputs).numpy()


@pytest.mark.parametrize("name", SHAPES)
def test_any_schedule_gives_the_same_bits(name):
    workload = native_workload(*SHAPES[name], threads=2)
    expected = run_schedule(workload, workload.default())
    assert expected.any()
    rng = np.random.default_rng(1)
    space = workload.space()
    for _ in range(4):
        decisions = {name: int(rng.choice(candidates)) for name, candidates in space.items()}
        assert np.array_equal(run_schedule(workload, decisions), expected), decisions


@pytest.mark.parametrize("target", ["x86-64", "x86-64-v3", "x86-64-v4", "rpi4"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_default_is_a_point_of_the_space(name, target):
    parsed = parse_target(target)
    family, shape = SHAPES[name]
    for threads in (1, 2):
        workload = Workload(family, shape, instruction_set(isa(parsed), cpu_features(parsed)), threads)
        assert workload.allows(workload.default())
        schedule = workload.schedules.default(workload.isa, shape, threads)
        assert workload.schedules.from_decisions(schedule.decisions()) == schedule
