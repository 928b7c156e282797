"""Kernels against their NumPy twins, bit for bit, on every instruction set this machine runs."""

from dataclasses import replace

import numpy as np
import pytest
from quantized_programs import TARGETS, TILES, build, machine_runs, program, random_codes, run
from tvm import relax

from tvm_qfp8.format import decode, encode, get_layout
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.conv_kernels import conv_shape
from tvm_qfp8.relay_passes.quantize_linear import codes_constant
from tvm_qfp8.topi import reference
from tvm_qfp8.topi.batch_matmul import BatchMatmulShape
from tvm_qfp8.topi.conv2d import ConvShape, merged_groups
from tvm_qfp8.topi.few_outputs import in_columns
from tvm_qfp8.topi.isa import instruction_set
from tvm_qfp8.topi.transposed import phases_of


@pytest.fixture(params=[*TARGETS.values(), TILES], ids=[*TARGETS, "amx"])
def target(request):
    if not machine_runs(request.param):
        pytest.skip(f"this CPU does not run {request.param}")
    return request.param


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


FEW_OUTPUTS = [
    (12, 30, 8, 3, (9, 9), (1, 1), (4, 4, 4, 4), (1, 1), 1),
    (9, 11, 70, 1, (5, 5), (1, 1), (2, 2, 2, 2), (1, 1), 1),
    (40, 12, 12, 2, (3, 7), (2, 1), (1, 3, 0, 9), (1, 2), 1),
    (5, 40, 33, 5, (1, 9), (1, 1), (0, 4, 0, 4), (2, 1), 1),
    (6, 30, 8, 4, (5, 5), (1, 1), (2, 2, 2, 2), (1, 1), 2),
]
COLUMNS = [
    (40, 1, 18, 18, (7, 1), (1, 1), (3, 0, 3, 0), (1, 1), 18),
    (40, 1, 16, 33, (5, 1), (1, 1), (2, 0, 1, 0), (1, 1), 1),
    (41, 1, 12, 9, (3, 1), (2, 1), (1, 0, 1, 0), (2, 1), 3),
    (40, 1, 8, 3, (9, 1), (1, 1), (4, 0, 4, 0), (1, 1), 1),
    (30, 1, 6, 20, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
]
CONVOLUTIONS = [
    # height, width, channels, out, kernel, stride, padding, dilation, groups
    (9, 11, 3, 8, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1),
    (7, 7, 16, 33, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    (10, 9, 5, 7, (1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 1),
    (6, 5, 20, 40, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    (12, 13, 6, 9, (3, 2), (1, 2), (2, 0, 1, 1), (2, 1), 3),
    (9, 11, 32, 32, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 8),
    (9, 11, 12, 24, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 12),
    (9, 11, 24, 24, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 24),
    (9, 11, 20, 20, (5, 5), (1, 1), (2, 2, 2, 2), (1, 1), 20),
    (9, 11, 20, 20, (3, 3), (1, 1), (0, 0, 0, 0), (2, 2), 20),
    (1, 40, 18, 18, (1, 7), (1, 1), (0, 3, 0, 3), (1, 1), 18),
    (8, 8, 6, 6, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 6),
    *COLUMNS,
    *FEW_OUTPUTS,
]


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("batch", [1, 2])
def test_conv2d_is_exact(target, case, batch):
    height, width, channels, out, kernel, stride, padding, dilation, groups = case
    rng = np.random.default_rng(height)
    weight = random_codes(rng, (out, *kernel, channels // groups))
    x = random_codes(rng, (batch, height, width, channels))
    a, bias = rng.random(out, np.float32) * 1e-4, rng.standard_normal(out, np.float32)
    shape = None

    def emit(builder, q):
        nonlocal shape
        call = qfp8_ops.conv2d(
            q,
            codes_constant(weight, "E2M5"),
            relax.const(a),
            relax.const(bias),
            strides=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
        shape = conv_shape(call)
        assert shape.width > 1, "images a pixel wide are rows"
        y = builder.emit(call)
        residual = builder.emit(relax.op.add(y, relax.const(np.float32(0.5))))
        return relax.op.clip(residual, 0.0, 6.0)

    quantized = program([((batch, height, width, channels), "UE2M6")], emit)
    if width == 1:
        x_twin, weight = x.reshape(batch, 1, height, channels), weight.reshape(out, *shape.kernel, -1)
    else:
        x_twin = x
    value = reference.scale_and_bias(reference.conv2d(x_twin, weight, shape), a, bias) + np.float32(0.5)
    expected = np.minimum(np.float32(6), np.maximum(np.float32(0), value))
    (got,) = run(build(quantized, target), x)
    assert np.array_equal(got, expected.reshape(got.shape))


@pytest.mark.parametrize("case", COLUMNS)
def test_a_column_is_a_row(case):
    height, width, channels, out, kernel, stride, padding, dilation, groups = case
    layouts = get_layout("UE2M6"), get_layout("E2M5")
    column = ConvShape(2, height, width, channels, out, kernel, stride, padding, dilation, groups, *layouts)
    row = column.column_as_row()
    rng = np.random.default_rng(height)
    weight, x = (
        random_codes(rng, (out, *kernel, channels // groups)),
        random_codes(rng, (2, height, 1, channels)),
    )
    standing = reference.conv2d(x, weight, column)
    lying = reference.conv2d(x.reshape(2, 1, height, channels), weight.reshape(out, *row.kernel, -1), row)
    assert column.is_column and not row.is_column
    assert standing.shape == (2, column.out_height, 1, out)
    assert np.array_equal(standing.reshape(lying.shape), lying)


@pytest.mark.parametrize("case", FEW_OUTPUTS)
def test_taps_are_columns_where_outputs_are_few(case):
    height, width, channels, out, kernel, stride, padding, dilation, _ = case
    layout = get_layout("E2M5")
    shape = ConvShape(1, height, width, channels, out, kernel, stride, padding, dilation, 1, layout, layout)
    by_columns = in_columns(instruction_set("avx512"), shape)
    assert by_columns.kernel == (kernel[0], 1) and by_columns.out_channels == kernel[1] * out
    assert in_columns(instruction_set("avx512"), replace(shape, out_channels=64)) is None


@pytest.mark.parametrize(
    "channels, out, groups, depth, width, kept",
    [
        (32, 32, 8, 4, 16, 2),  # as many products as before, in fewer groups
        (32, 32, 8, 2, 8, 4),
        (12, 24, 12, 2, 16, 2),
        (64, 64, 4, 4, 16, 4),
        (6, 9, 3, 2, 4, 3),
    ],
)
def test_narrow_groups_are_merged(channels, out, groups, depth, width, kept):
    layout = get_layout("E2M5")
    shape = ConvShape(1, 5, 6, channels, out, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), groups, layout, layout)
    rng = np.random.default_rng(0)
    codes = random_codes(rng, (out, 3, 3, channels // groups))
    merged, wide = merged_groups(shape, codes, depth, width)
    assert merged.groups == kept
    x = random_codes(rng, (1, 5, 6, channels))
    assert np.array_equal(reference.conv2d(x, wide, merged), reference.conv2d(x, codes, shape))


@pytest.mark.parametrize(
    "kernel, stride, padding, extra, groups, phases",
    [
        ((3, 3), (2, 2), (1, 1), 1, 1, 4),
        ((3, 3), (3, 3), (0, 0), 0, 2, 9),
        ((3, 3), (1, 1), (1, 1), 0, 1, 0),
        ((4, 4), (2, 2), (1, 1), 0, 1, 4),
        ((4, 4), (2, 2), (1, 1), 0, 8, 4),  # depthwise
        ((5, 4), (2, 1), (2, 1), 1, 4, 2),
        ((1, 16), (1, 8), (0, 4), 0, 1, 8),
        ((7, 3), (3, 2), (2, 0), 1, 1, 6),
        ((3, 3), (2, 2), (2, 2), 0, 1, 0),  # the first pixels are cut off
        ((2, 2), (3, 3), (0, 0), 0, 1, 0),  # outputs that meet no pixel
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_transposed_convolution_is_exact(target, kernel, stride, padding, extra, groups, phases, batch):
    rng = np.random.default_rng(stride)
    out = 8 if groups == 8 else 12
    x = random_codes(rng, (batch, 5, 6, 8))
    weight = random_codes(rng, (out, *kernel, 8 // groups))
    a, bias = np.ones(out, np.float32), np.zeros(out, np.float32)
    top, left = (extent - 1 - cut for extent, cut in zip(kernel, padding, strict=True))
    shape = None

    def emit(builder, q):
        nonlocal shape
        call = qfp8_ops.conv2d(
            q,
            codes_constant(weight, "E2M5"),
            relax.const(a),
            relax.const(bias),
            strides=(1, 1),
            padding=(top, left, top + extra, left + extra),
            dilation=(1, 1),
            groups=groups,
            input_dilation=stride,
        )
        shape = conv_shape(call)
        return call

    quantized = program([((batch, 5, 6, 8), "UE2M6")], emit)
    assert len(phases_of(shape)) == phases
    assert np.array_equal(
        run(build(quantized, target), x)[0], reference.conv2d(x, weight, shape).astype(np.float32)
    )


@pytest.mark.parametrize("kernel, out", [((2, 2), 32), ((3, 2), 48), ((2, 2), 24)])
@pytest.mark.parametrize("scales", [False, True])
def test_transposed_convolution_of_windows_apart_is_exact(target, kernel, out, scales):
    """Each pixel becomes a window: a dense layer, unless a vector of its columns would be of two pixels (24)."""
    rng = np.random.default_rng(out)
    x = random_codes(rng, (2, 5, 6, 20))
    weight = random_codes(rng, (out, *kernel, 20))
    a, bias = rng.random(out, np.float32), rng.standard_normal(out, np.float32)
    of_samples = rng.random(2, np.float32)
    shape = None

    def emit(_builder, q, *found):
        nonlocal shape
        call = qfp8_ops.conv2d(
            q,
            codes_constant(weight, "E2M5"),
            relax.const(a),
            relax.const(bias),
            strides=(1, 1),
            padding=(kernel[0] - 1, kernel[1] - 1, kernel[0] - 1, kernel[1] - 1),
            dilation=(1, 1),
            groups=1,
            input_dilation=kernel,
            **dict(zip(["scales"], found, strict=False)),
        )
        shape = conv_shape(call)
        return call

    inputs = [(x.shape, "UE2M6"), *([((2,), None)] if scales else [])]
    found = run(build(program(inputs, emit), target), x, *([of_samples] if scales else []))[0]
    assert shape.spreads_pixels and found.shape == (2, 5 * kernel[0], 6 * kernel[1], out)
    factors = of_samples[:, None, None] if scales else None
    expected = reference.scale_and_bias(reference.conv2d(x, weight, shape), a, bias, factors)
    assert np.array_equal(found, expected)


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


@pytest.mark.parametrize("channels, width", [(1, 9), (3, 37), (4, 16), (2, 3)])
def test_convolution_of_an_nchw_image_is_exact(target, channels, width):
    rng = np.random.default_rng(width)
    x, weight = random_codes(rng, (2, channels, 8, width)), random_codes(rng, (10, 3, 3, channels))
    shape = None

    def emit(_builder, q):
        nonlocal shape
        call = qfp8_ops.conv2d(
            q,
            codes_constant(weight, "E2M5"),
            relax.const(np.ones(10, np.float32)),
            relax.const(np.zeros(10, np.float32)),
            strides=(2, 2),
            padding=(1, 1, 0, 1),
            dilation=(1, 1),
            groups=1,
            channels_first=True,
        )
        shape = conv_shape(call)
        return call

    quantized = program([(x.shape, "UE2M6")], emit)
    expected = reference.conv2d(x.transpose(0, 2, 3, 1), weight, shape).astype(np.float32)
    assert np.array_equal(run(build(quantized, target), x)[0], expected)


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
