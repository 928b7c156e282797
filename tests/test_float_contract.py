"""The float contract: the same bits on every target, and fused multiply-adds only where they are asked for."""

import re
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import tvm
from assembly import fused_multiply_adds
from quantized_programs import TARGETS, build, machine_runs, program, random_codes, run
from tvm import relax

from tvm_qfp8.format import get_layout
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.quantize_linear import codes_constant
from tvm_qfp8.targets import parse_target
from tvm_qfp8.topi import reference
from tvm_qfp8.topi.float_contract import (
    as_bfloat16,
    from_bfloat16,
    fused_multiply_add,
    fused_multiply_add_in_float64,
    round_to_bfloat16,
    round_to_float16,
)
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, load, store, vector_runs

LIBM = re.compile(r"\b(expf?|tanhf?|erff?|powf?|logf?|rintf?|roundf?|nearbyintf?|floorf?|fmaf?)(@PLT)?\b")


def convolution():
    """Convolution -> ReLU6 -> encode, and a second output in float32 with a residual."""
    rng = np.random.default_rng(5)
    weight = random_codes(rng, (24, 3, 3, 10))
    a, bias = rng.random(24, np.float32) * 1e-4, rng.standard_normal(24, np.float32)

    def emit(builder, q):
        call = qfp8_ops.conv2d(
            q,
            codes_constant(weight, "E2M5"),
            relax.const(a),
            relax.const(bias),
            strides=(1, 1),
            padding=(1, 1, 1, 1),
            dilation=(1, 1),
            groups=1,
        )
        value = builder.emit(relax.op.clip(builder.emit(call), 0.0, 6.0))
        codes = builder.emit(qfp8_ops.encode(value, get_layout("UE2M6"), 0.013))
        return relax.Tuple([codes, value])

    return program([((1, 9, 7, 10), "E3M4")], emit), [random_codes(rng, (1, 9, 7, 10))]


def layer_norm():
    rng = np.random.default_rng(6)
    x = rng.standard_normal((5, 75)).astype(np.float32) * 3
    gamma, beta = rng.standard_normal((2, 75)).astype(np.float32)

    def emit(_builder, v):
        return relax.op.nn.layer_norm(v, relax.const(gamma), relax.const(beta), axes=-1, epsilon=1e-5)

    return program([(x.shape, None)], emit), [x]


def nonlinear():
    """Every kind of table, softmax, pooling."""
    rng = np.random.default_rng(7)
    x = (rng.standard_normal((1, 8, 8, 20)) * 4).astype(np.float32)

    def emit(builder, v):
        outputs = [
            builder.emit(qfp8_ops.interpolate(v, name, 1e-3))
            for name in ("gelu", "sigmoid", "tanh", "silu", "erf", "exp", "softplus")
        ]
        outputs.append(builder.emit(relax.op.nn.softmax(v, axis=-1)))
        outputs.append(builder.emit(relax.op.mean(v, axis=[1, 2])))
        outputs.append(builder.emit(relax.op.max(v, axis=[1, 2])))
        outputs.append(builder.emit(relax.op.nn.avg_pool2d(v, (3, 3), (2, 2), (1, 1, 1, 1), layout="NHWC")))
        return relax.Tuple(outputs)

    return program([(x.shape, None)], emit), [x]


PROGRAMS = [convolution, layer_norm, nonlinear]


@pytest.mark.parametrize("make", PROGRAMS)
def test_x86_instruction_sets_agree(make):
    mod, inputs = make()
    baseline = run(build(mod, TARGETS["sse2"]), *inputs)
    for name in ("avx2", "avx512"):
        if machine_runs(name):
            for ours, theirs in zip(baseline, run(build(mod, TARGETS[name]), *inputs), strict=True):
                np.testing.assert_array_equal(ours, theirs, err_msg=name)


@pytest.mark.aarch64
@pytest.mark.parametrize("make", PROGRAMS)
def test_aarch64_agrees_with_x86(make, run_aarch64):
    mod, inputs = make()
    baseline = run(build(mod, TARGETS["sse2"]), *inputs)
    emulated = run_aarch64(build(mod, "aarch64"), inputs)
    assert len(baseline) == len(emulated)
    for ours, theirs in zip(baseline, emulated, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("target", [*TARGETS.values(), "aarch64"])
@pytest.mark.parametrize("make", PROGRAMS)
def test_no_fused_multiply_add_and_no_libm(make, target):
    mod, _ = make()
    assembly = build(mod, target).mod.imports[0].inspect_source("asm")
    assert "mul" in assembly
    fused = fused_multiply_adds(assembly)
    assert not fused, f"fused multiply-adds: {fused[:5]}"
    calls = [line for line in assembly.splitlines() if re.match(r"\s+(callq?|bl|jmpq?)\s", line)]
    assert not [line for line in calls if LIBM.search(line)]


def awkward_factors():
    """float32 triples: any bit patterns, sums that cancel, and ties that a second rounding would decide wrongly."""
    rng = np.random.default_rng(8)
    count = 1 << 14
    a, b, c = rng.integers(0, 1 << 32, (3, count), np.uint32).view(np.float32)
    near = rng.standard_normal((2, count), np.float32)
    with np.errstate(all="ignore"):
        close = -(near[0] * near[1]) * rng.choice(np.float32([1, 1 + 2**-23, 2**-24, 3 * 2**-25]), count)
    tie = np.float32(1 + 2**-12), np.float32(1 + 2**-12), rng.choice(np.float32([2**-60, -(2**-60)]), count)
    sides = np.broadcast_to(tie[0], count), np.broadcast_to(tie[1], count), tie[2]
    rows = [(a, b, c), (near[0], near[1], close), sides, (near[0], near[1], c), (a, near[0], near[1])]
    return [np.concatenate(column) for column in zip(*rows, strict=True)]


def exact_sum(a, b, c) -> np.float32:
    """a * b + c of finite values, by rational numbers."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    with np.errstate(over="ignore"):
        rounded = np.float32(float(exact))
    # float() rounds once more: the nearest of the float32 neighbours is right, even at ties.
    candidates = [
        rounded,
        np.nextafter(rounded, np.float32(np.inf)),
        np.nextafter(rounded, np.float32(-np.inf)),
    ]
    finite = [one for one in candidates if np.isfinite(one)]
    if not np.isfinite(rounded) or not finite:
        return rounded
    return min(finite, key=lambda one: (abs(Fraction(float(one)) - exact), int(one.view(np.int32)) & 1))


def test_twin_of_fused_multiply_add_rounds_once():
    factors = [column[:: len(column) // 4001] for column in awkward_factors()]
    with np.errstate(all="ignore"):
        found = reference.fused_multiply_add(*factors)
    for values, one in zip(zip(*factors, strict=True), found, strict=True):
        if np.isfinite(values).all() and np.isfinite(one):
            assert one == exact_sum(*values), values


@pytest.mark.parametrize(
    "form, machine",
    [
        (fused_multiply_add, "avx2"),
        (fused_multiply_add, "avx512"),
        *[(fused_multiply_add_in_float64, machine) for machine in TARGETS],
    ],
)
def test_fused_multiply_add(form, machine):
    if not machine_runs(machine):
        pytest.skip(f"this CPU does not run {machine}")
    factors = awkward_factors()

    def body(a, b, c, out):
        def emit(at, lanes):
            store(out, at, form(*(load(one, at, lanes) for one in (a, b, c))), lanes)

        vector_runs(len(factors[0]), 16, emit)

    specs = [TensorSpec(factors[0].shape, "float32")] * 4
    target = parse_target(TARGETS[machine])
    function = tvm.compile(tvm.IRModule({"main": build_prim_func("main", specs, body)}), target=target)
    arrays = [tvm.runtime.tensor(one) for one in (*factors, np.empty_like(factors[0]))]
    function["main"](*arrays)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(arrays[3].numpy(), reference.fused_multiply_add(*factors))


@pytest.mark.parametrize(
    "machine, converts", [*[(machine, False) for machine in TARGETS], ("avx2", True), ("avx512", True)]
)
def test_rounding_to_float16(machine, converts):
    """All of its numbers, the middles between them, and the float32 on both sides of either."""
    if not machine_runs(machine):
        pytest.skip(f"this CPU does not run {machine}")
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    points = np.concatenate([halves, (halves[1:] + halves[:-1]) / 2, np.float32([1e-45, 1e-30])])
    around = np.concatenate([np.nextafter(points, -np.inf), points, np.nextafter(points, np.inf)])
    x = np.concatenate([around, -around])
    x = np.resize(x[np.abs(x) <= 65504], -(-len(x) // 16) * 16)

    found = mapped(machine, lambda value: round_to_float16(value, converts), x)
    expected = x.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def mapped(machine, function, x):
    """``function`` of vectors, compiled, over all of ``x``."""

    def body(source, target):
        def emit(at, lanes):
            store(target, at, function(load(source, at, lanes)), lanes)

        vector_runs(len(x), 16, emit)

    specs = [TensorSpec(x.shape, "float32")] * 2
    built = tvm.compile(
        tvm.IRModule({"main": build_prim_func("main", specs, body)}), target=parse_target(TARGETS[machine])
    )
    arrays = [tvm.runtime.tensor(x), tvm.runtime.tensor(np.empty_like(x))]
    built["main"](*arrays)
    return arrays[1].numpy()


@pytest.mark.parametrize("machine", TARGETS)
def test_rounding_to_bfloat16(machine):
    """All of its numbers, the middles between them, the float32 on both sides of either, infinities; and NaN."""
    if not machine_runs(machine):
        pytest.skip(f"this CPU does not run {machine}")
    words = np.arange(0x7F81, dtype=np.uint32) << 16
    bits = np.concatenate(
        [words[:-1] + part for part in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)] + [words[-1:]]
    )
    x = np.concatenate([bits, bits | 0x80000000]).astype(np.uint32).view(np.float32)
    not_numbers = np.array([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFFC00000, 0xFFFFFFFF], np.uint32)
    x = np.resize(x, -(-len(x) // 16) * 16)
    expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    for kept in (round_to_bfloat16, lambda value: from_bfloat16(as_bfloat16(round_to_bfloat16(value)))):
        np.testing.assert_array_equal(mapped(machine, kept, x).view(np.uint32), expected.view(np.uint32))
        assert np.isnan(mapped(machine, kept, np.resize(not_numbers, 16).view(np.float32))).all()
