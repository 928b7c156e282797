"""Kernels against their NumPy twins, bit for bit, on every instruction set this machine runs."""

import numpy as np
import pytest
from quantized_programs import build, program, random_codes, run
from tvm import relax

from tvm_qfp8.format import decode, encode, get_layout
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.quantize_linear import codes_constant
from tvm_qfp8.topi import reference
from tvm_qfp8.topi.batch_matmul import BatchMatmulShape


@pytest.mark.parametrize(
    "rows, columns, depth", [(1, 33, 7), (2, 16, 64), (7, 5, 3), (50, 70, 30), (130, 33, 65)]
)
@pytest.mark.parametrize("layout", ["E3M4", "UE3M5"])
def test_matmul_is_exact(target, rows, columns, depth, layout):
    rng = np.random.default_rng(rows)
    weight, x = random_codes(rng, (columns, depth)), random_codes(rng, (rows, depth))
    a, bias = rng.random(columns, np.float32) * 1e-4, rng.standard_normal(columns, np.float32)

    def emit(builder, q):
        y = builder.emit(
            qfp8_ops.matmul(q, codes_constant(weight, "E2M5"), relax.const(a), relax.const(bias))
        )
        y = builder.emit(relax.op.nn.relu(y))
        return qfp8_ops.encode(y, get_layout("E2M5"), 0.01)

    quantized = program([((rows, depth), layout)], emit)
    sums = reference.matmul(x, weight, get_layout(layout), get_layout("E2M5"))
    expected = np.maximum(np.float32(0), reference.scale_and_bias(sums, a, bias))
    got = run(build(quantized, target), x)[0]
    assert np.array_equal(got, encode(expected, 0.01, "E2M5"))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("rows, columns, depth", [(5, 7, 9), (20, 33, 16), (3, 16, 700), (59, 20, 4)])
def test_batch_matmul_is_exact(target, rows, columns, depth, cached, transpose, monkeypatch):
    if not cached:
        monkeypatch.setattr("tvm_qfp8.topi.batch_matmul.CACHED_ELEMENTS", 0)
    rng = np.random.default_rng(depth)
    y_shape = (2, columns, depth) if transpose else (2, depth, columns)
    x, y = random_codes(rng, (2, rows, depth)), random_codes(rng, y_shape)
    shape = BatchMatmulShape(2, rows, columns, depth, get_layout("UE3M5"), get_layout("E3M4"), transpose)

    def emit(_builder, a, b):
        return qfp8_ops.batch_matmul(a, b, 0.25, transpose_y=transpose)

    quantized = program([(x.shape, "UE3M5"), (y.shape, "E3M4")], emit)
    expected = reference.batch_matmul(x, y, shape) * np.float32(0.25)
    assert np.array_equal(run(build(quantized, target), x, y)[0], expected)


@pytest.mark.parametrize("length", [1, 5, 16, 33, 384])
def test_layer_norm_and_residual_follow_the_contract(target, length):
    rng = np.random.default_rng(length)
    x, gamma, beta = (rng.standard_normal(s).astype(np.float32) for s in ((3, length), length, length))

    def emit(builder, v):
        y = builder.emit(
            relax.op.nn.layer_norm(v, relax.const(gamma), relax.const(beta), axes=-1, epsilon=1e-5)
        )
        return relax.op.add(y, v)

    quantized = program([(x.shape, None)], emit)
    expected = reference.layer_norm(x, gamma, beta, 1e-5) + x
    assert np.array_equal(run(build(quantized, target), x)[0], expected)


@pytest.mark.parametrize("length", [1, 16, 50])
def test_l2_normalize_follows_the_contract(target, length):
    x = np.random.default_rng(length).standard_normal((4, length)).astype(np.float32)
    x[1] = 0.0
    x[2] *= 1e-16
    quantized = program([(x.shape, None)], lambda builder, v: qfp8_ops.l2_normalize(v, 1e-12))
    (found,) = run(build(quantized, target), x)
    assert np.array_equal(found, reference.l2_normalize(x, 1e-12))
    assert not found[1].any()


@pytest.mark.parametrize("width", [1, 7, 48])
def test_embedding(target, width):
    rng = np.random.default_rng(width)
    codes, scale = random_codes(rng, (20, width)), rng.random(20, np.float32)
    indices = np.array([[0, 19, 7], [-1, -20, 3]], np.int64)
    codes[codes == 0x80] = 0

    def emit(builder, q):
        rows = builder.emit(qfp8_ops.take(codes_constant(codes, "E2M5"), relax.const(scale), q))
        return relax.op.add(rows, relax.const(np.ones(width, np.float32)))

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 3), "int64"))
    with builder.function("main", [x]):
        with builder.dataflow():
            output = builder.emit_output(emit(builder, x))
        builder.emit_func_output(output)
    expected = decode(codes, scale, "E2M5", axis=0)[indices] + np.float32(1)
    np.testing.assert_array_equal(run(build(builder.get(), target), indices)[0], expected)


def test_threads_give_the_same_bits(target):
    rng = np.random.default_rng(0)
    weight, x = random_codes(rng, (300, 300)), random_codes(rng, (400, 300))
    a, bias = rng.random(300, np.float32), rng.random(300, np.float32)

    def emit(_builder, q):
        return qfp8_ops.matmul(q, codes_constant(weight, "E2M5"), relax.const(a), relax.const(bias))

    quantized = program([(x.shape, "E3M4")], emit)
    one, two = (run(build(quantized, target, threads), x)[0] for threads in (1, 2))
    assert np.array_equal(one, two)
    assert np.array_equal(
        one,
        reference.scale_and_bias(
            reference.matmul(x, weight, get_layout("E3M4"), get_layout("E2M5")), a, bias
        ),
    )


@pytest.mark.parametrize(
    "layout, bounds", [("UE2M6", (0.0, 6.0)), ("UE3M5", (0.0, 1e-3)), ("E2M5", (0.0, 6.0))]
)
def test_a_clip_before_an_encode_gives_the_same_codes(target, layout, bounds):
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.standard_normal(250) * 9, [0.0, -0.0, np.nan, 6.0, np.inf, -np.inf]]).astype(
        np.float32
    )
    for scale in (0.02, 1.0, 60.0):
        quantized = program(
            [((1, 256), None)],
            lambda b, v, scale=scale: qfp8_ops.encode(
                b.emit(relax.op.clip(v, *bounds)), get_layout(layout), scale
            ),
        )
        clipped = np.minimum(np.float32(bounds[1]), np.where(x > bounds[0], x, np.float32(bounds[0])))
        expected = encode(clipped, np.float32(scale), layout)
        assert np.array_equal(run(build(quantized, target), x.reshape(1, -1))[0].reshape(-1), expected)


@pytest.mark.parametrize(
    "axis, shapes", [(-1, [(2, 3, 5), (2, 3, 70)]), (1, [(2, 1, 9), (2, 4, 9), (2, 2, 9)])]
)
@pytest.mark.parametrize("dtype", ["float32", "uint8", "int64"])
def test_concat_copies_every_element(target, axis, shapes, dtype):
    parts = [np.random.default_rng(i).integers(0, 200, shape).astype(dtype) for i, shape in enumerate(shapes)]
    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", relax.TensorType(shape, dtype)) for i, shape in enumerate(shapes)]
    with builder.function("main", inputs):
        with builder.dataflow():
            output = builder.emit_output(relax.op.concat(inputs, axis))
        builder.emit_func_output(output)
    assert np.array_equal(run(build(builder.get(), target), *parts)[0], np.concatenate(parts, axis))


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize("length", [1, 5, 10, 16, 23, 130])
def test_softmax_of_any_length_and_with_masked_entries(target, length, logarithmic):
    rng = np.random.default_rng(length)
    x = (rng.standard_normal((4, length)) * 5).astype(np.float32)
    x[1, 1:] = -np.inf
    x[2, length // 2 :] -= 10000.0
    x[3] = -np.inf
    operator = relax.op.nn.log_softmax if logarithmic else relax.op.nn.softmax
    found = run(build(program([((4, length), None)], lambda _b, v: operator(v, -1)), target), x)[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        shifted = x.astype(np.float64) - x.max(-1, keepdims=True)
        expected = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
        if logarithmic:
            expected = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        # Attention asks for 0 where a mask leaves nothing.
        expected[3] = -np.inf if logarithmic else 0
    np.testing.assert_allclose(found, expected, rtol=1e-3 if logarithmic else 0, atol=1e-3)
