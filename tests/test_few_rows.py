"""Layers of one or two rows against the NumPy twin, exactly; their kernel depends on the machine, the sums do not."""

import numpy as np
import pytest
from quantized_programs import TARGETS, build, machine_runs, program, random_codes, run
from tvm import relax

from tvm_qfp8.format import decode_grid, get_layout
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.quantize_linear import codes_constant
from tvm_qfp8.targets import cpu_features, isa, parse_target
from tvm_qfp8.topi import reference
from tvm_qfp8.topi.few_rows import multiplies_magnitudes
from tvm_qfp8.topi.gemm import GemmShape
from tvm_qfp8.topi.isa import instruction_set


@pytest.mark.parametrize("rows, depth, columns", [(1, 130, 70), (2, 64, 24), (1, 7, 5), (2, 33, 100)])
@pytest.mark.parametrize("activation", ["E1M6", "UE1M7", "E2M5", "UE2M6", "E3M4", "UE3M5"])
def test_matmul(rows, depth, columns, activation):
    rng = np.random.default_rng(0)
    weight, x = random_codes(rng, (columns, depth)), random_codes(rng, (rows, depth))
    ones, zeros = np.ones(columns, np.float32), np.zeros(columns, np.float32)

    def emit(builder, x):
        call = qfp8_ops.matmul(x, codes_constant(weight, "E2M5"), relax.const(ones), relax.const(zeros))
        return builder.emit(call)

    (found,) = run(build(program([((rows, depth), activation)], emit), "native", threads=2), x)
    expected = reference.matmul(x, weight, get_layout(activation), get_layout("E2M5"))
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize("activation", ["E1M6", "UE1M7", "E2M5", "UE2M6", "E3M4", "UE3M5"])
def test_greatest_sums(activation):
    layouts = get_layout(activation), get_layout("E2M5")
    greatest = int(layouts[1].max_grid) * int(layouts[0].max_grid)
    # The bound counts the parts of an activation, which are a little more than itself.
    depth = int(0.98 * 2**31 / greatest)
    weight = np.full((20, depth), 0x7F, np.uint8)
    weight[1] |= 0x80
    weight[2, ::2] |= 0x80
    weight[3:, 1::3] = 0
    largest = np.uint8(0x7F if layouts[0].signed else 0xFF)
    target = parse_target("icelake-server")
    instructions = instruction_set(isa(target), cpu_features(target))
    assert multiplies_magnitudes(instructions, GemmShape(2, 20, depth, *layouts), weight)

    def emit(builder, x):
        ones, zeros = np.ones(20, np.float32), np.zeros(20, np.float32)
        call = qfp8_ops.matmul(x, codes_constant(weight, "E2M5"), relax.const(ones), relax.const(zeros))
        return builder.emit(call)

    compiled = build(program([((2, depth), activation)], emit), "native")
    x = np.full((2, depth), largest)
    x[1] = 0x80 | largest if layouts[0].signed else 0
    for codes in (x, np.zeros_like(x)):
        expected = reference.matmul(codes, weight, *layouts)
        np.testing.assert_array_equal(run(compiled, codes)[0], expected.astype(np.float32))


def test_magnitudes_are_for_vnni_and_for_sums_that_fit():
    target = parse_target("icelake-server")
    instructions = instruction_set(isa(target), cpu_features(target))
    layouts = get_layout("E3M4"), get_layout("E2M5")
    codes = np.full((16, 4000), 0x7F, np.uint8)
    assert multiplies_magnitudes(instructions, GemmShape(1, 16, 4000, *layouts), codes)
    assert not multiplies_magnitudes(instructions, GemmShape(3, 16, 4000, *layouts), codes)
    assert not multiplies_magnitudes(instruction_set("avx512"), GemmShape(1, 16, 4000, *layouts), codes)
    greatest = int(decode_grid(codes[0, :1], layouts[1])[0]) * layouts[0].max_grid
    long = np.full((16, 2**31 // greatest), 0x7F, np.uint8)
    assert not multiplies_magnitudes(instructions, GemmShape(1, 16, long.shape[1], *layouts), long)


def test_other_instruction_sets_give_the_same():
    rng = np.random.default_rng(1)
    weight, x = random_codes(rng, (40, 50)), random_codes(rng, (1, 50))
    a, bias = rng.random(40, np.float32), rng.random(40, np.float32)

    def emit(builder, x):
        return builder.emit(
            qfp8_ops.matmul(x, codes_constant(weight, "E2M5"), relax.const(a), relax.const(bias))
        )

    mod = program([((1, 50), "E3M4")], emit)
    targets = ["native", *(target for name, target in TARGETS.items() if machine_runs(name))]
    found = [run(build(mod, target), x)[0] for target in targets]
    assert all(np.array_equal(result, found[0]) for result in found)


def assembly(rows: int, columns: int, layout: str, cpu: str) -> str:
    weight = np.zeros((columns, 4096), np.uint8)

    def emit(builder, x):
        ones = relax.const(np.ones(columns, np.float32))
        return builder.emit(qfp8_ops.matmul(x, codes_constant(weight, layout), ones, ones))

    executable = build(program([((rows, 4096), layout)], emit), cpu)
    return "".join(module.inspect_source("asm") for module in executable.mod.imports)


@pytest.mark.parametrize("rows, layout", [(1, "E2M5"), (1, "E1M6"), (4, "E2M5")])
def test_large_weights_are_fetched_ahead(rows, layout):
    assert "prefetch" in assembly(rows, 512, layout, "icelake-server")
    assert "prefetch" not in assembly(rows, 64, layout, "icelake-server")


@pytest.mark.parametrize("rows, layout", [(1, "E2M5"), (1, "E1M6"), (4, "E2M5"), (16, "E1M6")])
def test_a_processor_that_looks_far_ahead_is_not_asked_for_streams(rows, layout):
    assert "prefetch" not in assembly(rows, 512, layout, "znver4")
