"""LayerNorm, RMSNorm and InstanceNorm are put back together from whatever operators a file holds."""

import numpy as np
import pytest
from test_recognize import build, const, operators
from tvm import relax

import tvm_qfp8
from tvm_qfp8.calibration import evaluate
from tvm_qfp8.relay_passes.fold_layer_norm import FoldLayerNorm
from tvm_qfp8.relay_passes.prepare import prepare
from tvm_qfp8.relay_passes.recognize_norms import RecognizeNorms
from tvm_qfp8.topi.float_contract import LANES

op = relax.op
SHAPE = (2, 3, 32)


@pytest.mark.parametrize("root", ["sqrt", "rsqrt", "power"])
@pytest.mark.parametrize("square", ["power", "multiply", "square"])
def test_layer_norm(root, square):
    gamma, beta = np.random.default_rng(1).standard_normal((2, 2 * LANES)).astype(np.float32)

    def emit(e, x):
        centred = e(op.subtract(x, e(op.mean(x, axis=[-1], keepdims=True))))
        squares = {
            "power": lambda: op.power(centred, const(2)),
            "multiply": lambda: op.multiply(centred, centred),
            "square": lambda: op.square(centred),
        }[square]()
        variance = e(op.add(e(op.mean(e(squares), axis=[-1], keepdims=True)), const(1e-5)))
        if root == "rsqrt":
            normalised = e(op.multiply(centred, e(op.rsqrt(variance))))
        else:
            deviation = op.sqrt(variance) if root == "sqrt" else op.power(variance, const(0.5))
            normalised = e(op.divide(centred, e(deviation)))
        return op.add(e(op.multiply(normalised, const(gamma))), const(beta))

    mod = FoldLayerNorm()(RecognizeNorms()(build(emit)))
    assert operators(mod) == ["relax.nn.layer_norm"]
    x = np.random.default_rng(0).standard_normal((2, 3, 32)).astype(np.float32)
    np.testing.assert_allclose(evaluate(mod, {"x": x})[0], evaluate(build(emit), {"x": x})[0], atol=1e-5)


def test_layer_norm_alone():
    def emit(e, x):
        centred = e(op.subtract(x, e(op.mean(x, axis=[-1], keepdims=True))))
        variance = e(op.mean(e(op.multiply(centred, centred)), axis=[-1], keepdims=True))
        return op.divide(centred, e(op.sqrt(e(op.add(variance, const(1e-6))))))

    mod = FoldLayerNorm()(RecognizeNorms()(build(emit)))
    assert operators(mod) == ["relax.nn.layer_norm"]
    x = np.random.default_rng(0).standard_normal((2, 3, 32)).astype(np.float32)
    np.testing.assert_allclose(evaluate(mod, {"x": x})[0], evaluate(build(emit), {"x": x})[0], atol=1e-5)


def keras(axis, shape):
    """``inputs * inv + (beta - mean * inv)``, ``inv`` with the scale in it."""
    gamma, beta = (2 * np.random.default_rng(2).standard_normal((2, *shape))).astype(np.float32)

    def emit(e, x):
        mean, variance = e(op.mean(x, axis, True)), e(op.variance(x, axis, True))
        inverse = e(op.multiply(e(op.rsqrt(e(op.add(variance, const(1e-3))))), const(gamma)))
        shift = e(op.add(e(op.multiply(e(op.negative(mean)), inverse)), const(beta)))
        return op.add(e(op.multiply(x, inverse)), shift)

    return emit


def flax(axis, shape):
    """Sums that lose their axis, the variance as a difference of squares, the scale at the deviation."""
    gamma, beta = (2 * np.random.default_rng(2).standard_normal((2, *shape))).astype(np.float32)

    def emit(e, x):
        extents = [int(n) for n in x.ty.shape]
        kept = [1 if i == axis % len(extents) else n for i, n in enumerate(extents)]
        share = const(1 / extents[axis])

        def mean(value):
            return e(op.multiply(e(op.sum(value, [axis], keepdims=False)), share))

        first = mean(x)
        difference = e(op.subtract(mean(e(op.multiply(x, x))), e(op.multiply(first, first))))
        variance = e(op.reshape(e(op.maximum(difference, const(0))), kept))
        deviation = e(op.sqrt(e(op.add(variance, const(1e-6)))))
        inverse = e(op.multiply(e(op.divide(const(1), deviation)), const(gamma)))
        centred = e(op.subtract(x, e(op.broadcast_to(e(op.reshape(first, kept)), extents))))
        return op.add(e(op.multiply(centred, inverse)), const(beta))

    return emit


def rms(axis, shape):
    gamma = np.random.default_rng(2).standard_normal(shape).astype(np.float32)

    def emit(e, x):
        squares = e(op.mean(e(op.square(x)), axis, True))
        inverse = e(op.multiply(e(op.rsqrt(e(op.add(squares, const(1e-5))))), const(gamma)))
        return op.multiply(x, inverse)

    return emit


FORMS = [
    (keras([-1], (32,)), SHAPE, "relax.nn.layer_norm"),
    (keras([1], (3, 1)), SHAPE, "relax.nn.layer_norm"),
    (keras([1], (1, 24, 1, 1)), (2, 24, 5, 7), "relax.nn.layer_norm"),
    (keras([0], (32,)), (32,), "relax.nn.layer_norm"),
    (flax(2, (1, 1, 32)), SHAPE, "relax.nn.layer_norm"),
    (flax(1, (1, 24, 1)), (2, 24, 9), "relax.nn.layer_norm"),
    (rms([-1], (1, 1, 32)), SHAPE, "relax.nn.rms_norm"),
    (rms([1], (24, 1)), (2, 24, 9), "relax.nn.rms_norm"),
]


@pytest.mark.parametrize("emit, shape, expected", FORMS)
@pytest.mark.parametrize("size", [1e-2, 3.0])
def test_forms_of_frameworks(emit, shape, expected, size):
    mod = FoldLayerNorm()(RecognizeNorms()(build(emit, shape)))
    scale = [] if expected == "relax.nn.layer_norm" else ["relax.multiply"]
    assert operators(mod) == [expected, *scale]
    x = (size * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
    got, wanted = (evaluate(program, {"x": x})[0] for program in (mod, build(emit, shape)))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_instance_norm_of_an_image_with_channels_last():
    shape = (2, 6, 5, 24)
    emit = keras([1, 2], (1, 1, 24))
    assert "relax.nn.layer_norm" not in operators(RecognizeNorms()(build(emit, shape))), (
        "scales are of channels"
    )

    def plain(e, x):
        mean, variance = e(op.mean(x, [1, 2], True)), e(op.variance(x, [1, 2], True))
        return op.divide(e(op.subtract(x, mean)), e(op.sqrt(e(op.add(variance, const(1e-3))))))

    mod = prepare(build(plain, shape))
    assert operators(mod) == ["relax.nn.group_norm"]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    np.testing.assert_allclose(
        evaluate(mod, {"x": x})[0], evaluate(build(plain, shape), {"x": x})[0], atol=1e-5
    )


def test_a_norm_over_channels_stays_in_the_layout_of_convolutions():
    weight = np.random.default_rng(1).standard_normal((24, 3, 3, 3)).astype(np.float32)

    def emit(e, x):
        y = e(op.nn.conv2d(x, relax.const(weight), padding=1))
        return op.nn.conv2d(
            e(keras([1], (1, 24, 1, 1))(e, y)), relax.const(np.ones((8, 24, 1, 1), np.float32))
        )

    found = operators(prepare(build(emit, (1, 3, 9, 8))))
    assert found.count("relax.permute_dims") == 2, "at the input and at the output"
    assert found.count("relax.nn.layer_norm") == 1 and "relax.mean" not in found


def wrong_count(e, x):
    mean = e(op.multiply(e(op.sum(x, [-1], True)), const(1 / 31)))
    variance = e(op.mean(e(op.square(e(op.subtract(x, mean)))), [-1], True))
    return op.divide(e(op.subtract(x, mean)), e(op.sqrt(e(op.add(variance, const(1e-5))))))


def scale_of_rows(e, x):
    gamma = np.arange(1, 4, dtype=np.float32).reshape(3, 1)
    return keras([-1], (32,))(lambda v: e(v), e(op.multiply(x, const(gamma))))


def rows_on_columns(e, x):
    """Means and deviations of rows, applied to columns: of a square only the shape agrees."""
    mean = e(op.mean(x, [1], keepdims=False))
    variance = e(op.variance(x, [1], keepdims=False))
    return op.divide(e(op.subtract(x, mean)), e(op.sqrt(e(op.add(variance, const(1e-5))))))


def means_turned(e, x):
    """Means that lose their axis and get one of 1 at another place."""
    mean = e(op.reshape(e(op.mean(x, [1], keepdims=False)), (1, 32, 1)))
    variance = e(op.reshape(e(op.variance(x, [1], keepdims=False)), (1, 32, 1)))
    return op.divide(e(op.subtract(x, mean)), e(op.sqrt(e(op.add(variance, const(1e-5))))))


@pytest.mark.parametrize(
    "emit, shape",
    [(wrong_count, SHAPE), (rows_on_columns, (32, 32)), (means_turned, (1, 32, 32))],
)
def test_near_misses_stay(emit, shape):
    mod = RecognizeNorms()(build(emit, shape))
    assert not {"relax.nn.layer_norm", "relax.nn.rms_norm"} & set(operators(mod))


def two_axes(e, x):
    centred = e(op.subtract(x, e(op.mean(x, [1], True))))
    variance = e(op.mean(e(op.square(centred)), [2], True))
    return op.divide(centred, e(op.sqrt(e(op.add(variance, const(1e-5))))))


def test_a_rows_on_columns_stays_before_a_norm():
    mod = RecognizeNorms()(build(two_axes))
    assert operators(mod) == ["relax.mean", "relax.subtract", "relax.nn.rms_norm"]


def test_a_scale_of_rows_before_a_norm_stays_before_it():
    mod = RecognizeNorms()(build(scale_of_rows))
    assert operators(mod)[:2] == ["relax.multiply", "relax.nn.layer_norm"]
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    got, wanted = (evaluate(program, {"x": x})[0] for program in (mod, build(scale_of_rows)))
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_a_network_of_norms_as_frameworks_write_them_compiles():
    def emit(e, x):
        y = e(flax(1, (1, 24, 1))(e, x))
        return e(keras([-1], (9,))(e, y))

    x = np.random.default_rng(0).standard_normal((2, 24, 9)).astype(np.float32)
    module = tvm_qfp8.compile(build(emit, (2, 24, 9)))
    expected = evaluate(build(emit, x.shape), {"x": x})[0]
    np.testing.assert_allclose(module.run({"x": x})[0], expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(8,), (5, 6), (5, 6, 7), (3, 4, 5, 6)])
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_norms_over_any_axis_compile(shape, kind):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for axis, length in enumerate(shape):
        one, zero = const(np.ones(length)), const(np.zeros(length))

        def emit(e, v, axis=axis, one=one, zero=zero):
            if kind == "rms_norm":
                return op.nn.rms_norm(v, one, axes=[axis], epsilon=1e-5)
            return op.nn.layer_norm(v, one, zero, axes=[axis], epsilon=1e-5)

        mod = build(emit, shape)
        got = tvm_qfp8.compile(mod).run({"x": x})[0]
        np.testing.assert_allclose(got, evaluate(mod, {"x": x})[0], atol=1e-5)
