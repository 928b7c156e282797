"""Rows that are rotated before they are encoded."""

import numpy as np
import pytest
from cuda_emulator import run_program
from quantized_programs import RUNS, TARGETS, build, program, run
from relax_programs import random
from test_cuda import NEEDS_COMPILER
from test_own_scales import db, lowered_for_cuda, network, weights_of
from tvm import relax

from tvm_qfp8 import Config, compile
from tvm_qfp8.calibration import calibrate
from tvm_qfp8.calibration.choose_activation import LINEAR
from tvm_qfp8.calibration.plan import ActivationQuantization
from tvm_qfp8.format import get_layout
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.topi import reference
from tvm_qfp8.topi.rotation import largest_order, restored, rotated


def hadamard(order):
    matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


@pytest.mark.parametrize("order", [1, 2, 8, 16])
def test_a_rotation_is_a_product_with_a_hadamard_matrix(order):
    x = random(3, 5, order * 6)
    matrix = np.kron(hadamard(order), np.eye(6))
    np.testing.assert_allclose(rotated(x, order), x @ matrix, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(restored(rotated(x, order), order), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "channels, order",
    [(384, 16), (64, 16), (96, 8), (120, 8), (144, 8), (32, 8), (100, 1), (24, 1), (16, 1), (1, 1)],
)
def test_the_order_divides_rows_into_vectors(channels, order):
    assert largest_order(channels) == order


def test_weights_turn_the_other_way():
    factors = np.exp2(random(64))
    activation = ActivationQuantization("E1M6", None, factors, rotation=16)
    x, weight = random(7, 64, seed=1), random(64, 5, seed=2)
    product = activation.prepared(x) @ activation.met_by(weight, 0)
    np.testing.assert_allclose(product, x @ weight, rtol=1e-4, atol=1e-4)


def encoded(shape, factors, rotation, before=lambda builder, x: x, is_read=False):
    def emit(builder, x):
        rows = before(builder, x)
        call = qfp8_ops.encode_rows(rows, relax.const(factors), get_layout("E1M6"), rotation)
        both = builder.emit(call)
        parts = [builder.emit(relax.TupleGetItem(both, part)) for part in range(2)]
        return relax.Tuple([*parts, *([rows] if is_read else [])])

    return program([(shape, None)], emit)


def sizes(*shape):
    """Ordinary rows and such that are zero, tiny and huge."""
    x = random(*shape)
    x[:4] *= np.float32([0, 1e-42, 1e36, 300])[: len(x), None]
    return x


def check(found, x, factors, rotation):
    expected_codes, expected_scales = reference.encode_rows(x, get_layout("E1M6"), factors, rotation)
    codes, scales, *_ = found
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(scales, expected_scales)


@pytest.mark.parametrize("isa", RUNS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "rows, channels, rotation",
    [(37, 384, 16), (1, 96, 8), (5, 320, 16), (700, 64, 16), (0, 64, 16), (6, 120, 8), (6, 40, 8)],
)
def test_encode_is_its_twin(isa, threads, rows, channels, rotation):
    """Vectors of a part of the channels are shorter than a register, equal, or overlap."""
    factors, x = np.exp2(random(channels, seed=3)), sizes(rows, channels)
    found = run(build(encoded(x.shape, factors, rotation), TARGETS[isa], threads), x)
    check(found, x, factors, rotation)


@pytest.mark.parametrize("isa", RUNS)
@pytest.mark.parametrize("is_read", [False, True])
def test_a_norm_encodes_its_rotated_rows(isa, is_read):
    x, gamma, beta = random(50, 192), random(192, seed=1), random(192, seed=2)
    factors = np.exp2(random(192, seed=3))

    def norm(builder, x):
        return builder.emit(
            relax.op.nn.layer_norm(x, relax.const(gamma), relax.const(beta), axes=[-1], epsilon=1e-5)
        )

    found = run(build(encoded(x.shape, factors, 16, norm, is_read), TARGETS[isa]), x)
    rows = reference.layer_norm(x, gamma, beta, 1e-5)
    check(found, rows, factors, 16)
    if is_read:
        np.testing.assert_array_equal(found[2], rows)


@NEEDS_COMPILER
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("channels, rotation", [(192, 16), (120, 8)])
def test_cuda_gives_the_same_bits(with_norm, channels, rotation, tmp_path):
    """Its threads know their own elements of a row only, so a rotation is a kernel of its own."""
    x, ones = sizes(9, channels), relax.const(np.ones(channels, np.float32))
    factors = np.exp2(random(channels, seed=3))

    def norm(builder, x):
        return builder.emit(relax.op.nn.layer_norm(x, ones, ones, axes=[-1], epsilon=1e-5))

    before = {"before": norm} if with_norm else {}
    lowered = lowered_for_cuda(encoded(x.shape, factors, rotation, **before))
    names = {var.name_hint for var in lowered.get_global_vars()}
    assert "encode_rows" in names
    one = np.ones(channels, np.float32)
    check(
        run_program(lowered, [x], tmp_path),
        reference.layer_norm(x, one, one, 1e-5) if with_norm else x,
        factors,
        rotation,
    )


@pytest.mark.aarch64
@pytest.mark.parametrize("target", ["rpi4", "rpi5"])
@pytest.mark.parametrize("channels, rotation", [(192, 16), (120, 8)])
def test_aarch64_gives_the_same_bits(run_aarch64, target, channels, rotation):
    factors, x = np.exp2(random(channels, seed=3)), sizes(6, channels)
    check(run_aarch64(build(encoded(x.shape, factors, rotation), target), [x]), x, factors, rotation)


def spread_outliers(count, tokens=24, channels=64):
    """A few channels of each token, ever others, are far larger than the rest."""
    samples = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((1, tokens, channels)).astype(np.float32)
        for token in x[0]:
            token[rng.choice(channels, 2, replace=False)] *= 12
        samples.append({"x0": x})
    return samples


def test_linear_layouts_rotate_rows_of_outliers():
    mod, samples = network(64), spread_outliers(8)
    plan = calibrate(mod, samples, Config(byte_loss_db=60.0))
    activations = [one.activation for one in plan.linear.values()]
    assert all(one.layout in LINEAR.activations and one.rotation == 16 for one in activations)
    module = compile(mod, calibration=samples, config=Config(byte_loss_db=60.0))
    assert "E1M6 by row, rotated" in module.report.to_text()
    exact = samples[0]["x0"] @ sum(weight.value.numpy() for weight in weights_of(mod))
    assert db(exact, module.run(samples[0])[0]) > 36


def test_rows_that_are_alike_are_not_rotated():
    rng = np.random.default_rng(0)
    samples = [
        {"x0": rng.uniform(-1, 1, (1, 24, 64)).astype(np.float32) * np.float32(10.0**i)} for i in range(-3, 3)
    ]
    plan = calibrate(network(64), samples, Config(byte_loss_db=60.0))
    assert all(one.activation.by_rows and one.activation.rotation == 1 for one in plan.linear.values())
