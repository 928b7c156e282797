"""The float contract: the same bits on every target, and no fused multiply-add in any kernel."""

import re

import numpy as np
import pytest
from assembly import fused_multiply_adds
from quantized_programs import TARGETS, build, machine_runs, program, random_codes, run
from tvm import relax

from tvm_qfp8.format import get_layout
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.quantize_linear import codes_constant

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
