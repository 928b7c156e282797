"""Convolutions against their NumPy twins, bit for bit, on every instruction set this machine runs."""

from dataclasses import replace

import numpy as np
import pytest
from quantized_programs import build, program, random_codes, run
from tvm import relax

from tvm_qfp8.format import get_layout
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.conv_kernels import conv_shape
from tvm_qfp8.relay_passes.quantize_linear import codes_constant
from tvm_qfp8.topi import reference
from tvm_qfp8.topi.conv2d import ConvShape, merged_groups
from tvm_qfp8.topi.few_outputs import in_columns
from tvm_qfp8.topi.isa import instruction_set
from tvm_qfp8.topi.transposed import phases_of

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
