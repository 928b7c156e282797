"""Data-driven rounding: never worse than nearest, exact codes, every kind of layer."""

import numpy as np
import pytest
from tvm import relax

from tvm_qfp8.calibration.compensation import Moments, compensated
from tvm_qfp8.calibration.evaluate import Program
from tvm_qfp8.calibration.input_rows import InputRows
from tvm_qfp8.calibration.linear import find_linear, quantized_weight
from tvm_qfp8.calibration.rounding import SHALLOW_DEPTH, ColumnRounding, can_round, rounded_on_data
from tvm_qfp8.format import decode

RNG = np.random.default_rng(11)


def linear_of(shape, emit):
    """The one linear operator of a small module."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_output(emit(x))
        builder.emit_func_output(y)
    return next(iter(find_linear(Program(builder.get())).linear.values()))


def const(*shape):
    return relax.const(RNG.standard_normal(shape).astype(np.float32))


def conv(out, kernel, channels, groups):
    weight = const(out, kernel, kernel, channels // groups)
    return lambda x: relax.op.nn.conv2d(
        x, weight, padding=1, groups=groups, data_layout="NHWC", kernel_layout="OHWI"
    )


LAYERS = {
    "matmul": ((4, 20, 48), lambda x: relax.op.matmul(x, const(48, 24))),
    "conv": ((1, 9, 9, 8), conv(12, 3, 8, 1)),
    "grouped": ((1, 9, 9, 8), conv(12, 3, 8, 2)),
    "depthwise": ((1, 12, 12, 16), conv(16, 3, 16, 16)),
}


def correlated(shape):
    """Inputs whose channels and neighbours depend on each other, with a mean: where rounding on data pays."""
    channels = shape[-1]
    mixing = RNG.standard_normal((channels // 4, channels)) + 0.05 * RNG.standard_normal((1, channels))
    base = RNG.standard_normal((*shape[:-1], channels // 4)) @ mixing
    for axis in range(1, len(shape) - 1):
        base = base + np.roll(base, 1, axis) + np.roll(base, 2, axis)
    return (base + 0.1 * RNG.standard_normal(shape) + 1).astype(np.float32)


@pytest.mark.parametrize("name", LAYERS)
def test_output_error_falls_and_codes_are_exact(name):
    shape, emit = LAYERS[name]
    linear = linear_of(shape, emit)
    assert can_round(linear)
    samples = [correlated(shape) for _ in range(4)]
    inputs = InputRows(linear, len(samples))
    for sample in samples:
        inputs.add(sample, sample, None)
    nearest = quantized_weight(linear)
    rounded = rounded_on_data(linear, [nearest], inputs)
    shallow = nearest.codes.size // nearest.scale.size <= SHALLOW_DEPTH
    assert shallow != np.array_equal(rounded.scale, nearest.scale)
    assert rounded.codes.shape == nearest.codes.shape and rounded.axis == nearest.axis
    np.testing.assert_array_equal(
        rounded.dequantize(), decode(rounded.codes, rounded.scale, rounded.layout, rounded.axis)
    )

    def output_error(weight):
        total = 0.0
        for sample in samples:
            change = linear.rows(linear.output(sample, weight) - linear.output(sample, linear.weight))
            total += float(((change - change.mean(0)) ** 2).sum())
        return total

    assert output_error(rounded.dequantize()) < 0.9 * output_error(nearest.dequantize())


def test_scales_of_shallow_layers_are_searched_with_the_codes(monkeypatch):
    """The scale of least squared error of nine weights is not that of least error of what neighbours give."""
    shape, emit = LAYERS["depthwise"]
    linear = linear_of(shape, emit)
    x = correlated((8, *shape[1:]))
    inputs = InputRows(linear, 1)
    inputs.add(x, x, None)

    def error():
        change = rounded_on_data(linear, [quantized_weight(linear)], inputs).dequantize() - linear.weight
        return float(linear.rows(linear.output(x, change)).var(axis=0).sum())

    searched = error()
    monkeypatch.setattr("tvm_qfp8.calibration.rounding.SHALLOW_DEPTH", 0)
    assert searched < 0.8 * error()


def test_a_degenerate_covariance_keeps_the_nearest_codes():
    linear = linear_of(*LAYERS["matmul"])
    nearest = quantized_weight(linear)
    inputs = InputRows(linear, 1)
    inputs.add(np.ones((4, 20, 48), np.float32), np.ones((4, 20, 48), np.float32), None)
    assert rounded_on_data(linear, [nearest], inputs) is nearest


def test_columns_without_correlation_are_rounded_to_nearest():
    weight = RNG.standard_normal((1, 5, 30)).astype(np.float32)
    scale = np.full((1, 5), 0.01, np.float32)
    rounding = ColumnRounding.of(np.eye(30)[None] * 7.0)

    def nearest(values, scale):
        return np.rint(values / scale) * scale

    np.testing.assert_array_equal(rounding.rounded(weight, scale, nearest), nearest(weight, scale[..., None]))


def test_masked_tokens_do_not_count():
    linear = linear_of(*LAYERS["matmul"])
    x = correlated((4, 20, 48))
    tokens = np.arange(80) % 20 < 10
    masked, kept = InputRows(linear, 1), InputRows(linear, 1)
    poisoned = x.copy()
    poisoned.reshape(-1, 48)[~tokens] = 1e6
    masked.add(poisoned, poisoned, tokens)
    kept.add(x[:, :10], x[:, :10], None)
    np.testing.assert_allclose(masked.even.covariance(), kept.even.covariance(), rtol=1e-4, atol=1e-2)


def moments(received, exact):
    found = Moments(1, received.shape[1])
    found.add(received[None], exact[None])
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_weights_make_up_for_the_error_of_their_input(name):
    """Of an input too large by a tenth and noisy; measured on samples that were not fitted."""
    shape, emit = LAYERS[name]
    linear = linear_of(shape, emit)
    inputs, nearest = InputRows(linear, 8), quantized_weight(linear)
    pairs = [(1.1 * x + 0.3 * RNG.standard_normal(shape), x) for x in (correlated(shape) for _ in range(12))]
    pairs = [(received.astype(np.float32), exact) for received, exact in pairs]
    for received, exact in pairs[:8]:
        inputs.add(received, exact, None)
    rounded = rounded_on_data(linear, [nearest], inputs)

    def output_error(weight):
        total = 0.0
        for received, exact in pairs[8:]:
            change = linear.rows(linear.output(received, weight) - linear.output(exact, linear.weight))
            total += float(((change - change.mean(0)) ** 2).sum())
        return total

    assert output_error(rounded.dequantize()) < 0.9 * output_error(nearest.dequantize())


def test_noise_is_not_fitted():
    """Two folds whose errors have nothing in common: no ridge helps, the weights stay."""
    received = RNG.standard_normal((40, 24)).astype(np.float32)
    error = 0.5 * RNG.standard_normal((40, 24)).astype(np.float32)
    weight = RNG.standard_normal((1, 6, 24)).astype(np.float32)
    even, odd = moments(received, received + error), moments(received, received - error)
    assert compensated(weight, even, odd) is weight


def test_one_sample_is_not_enough_to_compensate():
    received = RNG.standard_normal((40, 24)).astype(np.float32)
    weight = RNG.standard_normal((1, 6, 24)).astype(np.float32)
    assert compensated(weight, moments(received, 0.9 * received), Moments(1, 24)) is weight


@pytest.mark.parametrize("spread, layout", [(3.0, "E2M5"), (0.1, "E1M6")])
def test_the_layout_that_errs_less_at_the_output(spread, layout):
    """Weights of many sizes want fine small steps, weights of one size want linear ones."""
    sizes = np.exp2(spread * RNG.standard_normal((96, 16)))
    weight = relax.const((RNG.choice([-1, 1], (96, 16)) * sizes).astype(np.float32))
    linear = linear_of((40, 5, 96), lambda x: relax.op.matmul(x, weight))
    x = RNG.standard_normal((40, 5, 96)).astype(np.float32)
    inputs = InputRows(linear, 1)
    inputs.add(x, x, None)
    nearest = [quantized_weight(linear, (name,)) for name in ("E2M5", "E1M6")]
    assert rounded_on_data(linear, nearest, inputs).layout == layout
