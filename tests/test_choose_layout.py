"""Channels last: same numbers, few transpositions."""

import numpy as np
import pytest
from test_recognize import operators
from tvm import relax

from tvm_qfp8.calibration import evaluate
from tvm_qfp8.relay_passes.prepare import prepare

op = relax.op
RNG = np.random.default_rng(3)


def const(*shape):
    return relax.const(RNG.standard_normal(shape).astype(np.float32))


def build(shape, emit):
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            output = builder.emit_output(emit(builder.emit, x))
        builder.emit_func_output(output)
    return builder.get()


def cnn(e, x):
    y = e(op.add(e(op.nn.conv2d(x, const(8, 3, 3, 3), strides=2, padding=1)), const(1, 8, 1, 1)))
    y = e(op.nn.relu(y))
    z = e(op.nn.conv2d(y, const(8, 1, 3, 3), padding=1, groups=8))
    z = e(op.add(e(op.multiply(z, const(8, 1, 1))), y))
    z = e(op.concat([z, y], axis=1))
    z = e(op.nn.max_pool2d(z, (2, 2), (2, 2)))
    z = e(op.nn.avg_pool2d(z, (2, 2), (1, 1), (1, 1, 0, 0)))
    return op.nn.softmax(e(op.reshape(e(op.mean(z, axis=[2, 3], keepdims=True)), (1, 16))))


def squeeze_excite(e, x):
    y = e(op.nn.conv2d(x, const(8, 3, 1, 1)))
    gate = e(op.sigmoid(e(op.nn.conv2d(e(op.mean(y, axis=[2, 3], keepdims=True)), const(8, 8, 1, 1)))))
    return op.multiply(y, gate)


def transposed(e, x):
    y = e(op.nn.conv2d_transpose(x, const(3, 5, 3, 3), strides=(2, 2), padding=(1, 1), output_padding=(1, 1)))
    return op.add(y, const(1, 5, 1, 1))


def to_tokens(e, x):
    y = e(op.nn.conv2d(x, const(6, 3, 4, 4), strides=(4, 4)))
    return op.permute_dims(e(op.reshape(y, (1, 6, 9))), [0, 2, 1])


def reflected(e, x):
    """Padding as torch's programs hold it."""
    y = e(op.nn.conv2d(x, const(8, 3, 3, 3)))
    for axis, length in ((3, 10), (2, 10)):
        places = np.abs(np.arange(-1, length + 1))
        y = e(op.take(y, relax.const(np.minimum(places, 2 * length - 2 - places)), axis))
    return op.nn.conv2d(y, const(4, 8, 3, 3))


@pytest.mark.parametrize(
    "emit, permutes", [(cnn, 1), (squeeze_excite, 2), (transposed, 2), (to_tokens, 3), (reflected, 2)]
)
def test_the_numbers_stay(emit, permutes):
    mod = build((1, 3, 12, 12), emit)
    x = RNG.standard_normal((1, 3, 12, 12)).astype(np.float32)
    canonical = prepare(mod)
    np.testing.assert_allclose(
        evaluate(canonical, {"x": x})[0], evaluate(mod, {"x": x})[0], rtol=1e-4, atol=1e-4
    )
    assert operators(canonical).count("relax.permute_dims") <= permutes


def test_conv1d_becomes_conv2d():
    def emit(e, x):
        return op.add(e(op.nn.conv1d(x, const(8, 2, 3), strides=2, padding=(1, 2), groups=3)), const(1, 8, 1))

    def grouped(e, x):
        return op.nn.conv1d(x, const(9, 2, 3), strides=2, padding=(1, 2), groups=3)

    x = RNG.standard_normal((2, 6, 20)).astype(np.float32)
    mod = build((2, 6, 20), grouped)
    canonical = prepare(mod)
    assert "relax.nn.conv2d" in operators(canonical) and "relax.nn.conv1d" not in operators(canonical)
    np.testing.assert_allclose(
        evaluate(canonical, {"x": x})[0], evaluate(mod, {"x": x})[0], rtol=1e-4, atol=1e-4
    )


def everything_follows(e, x):
    y = e(op.nn.conv2d(x, const(8, 3, 3, 3)))
    first, second = (e(relax.TupleGetItem(e(op.split(y, 2, 1)), i)) for i in (0, 1))
    sliced = e(op.strided_slice(e(op.concat([second, first], 1)), [1, -1], [1, 0], [7, 8], [2, 1]))
    padded = e(op.nn.pad(sliced, [0, 0, 1, 0, 0, 1, 2, 0]))
    gate = e(op.sigmoid(e(op.add(e(op.mean(padded, 1, True)), e(op.max(padded, [-3], True))))))
    resized = e(op.image.resize2d(e(op.multiply(padded, gate)), (20, 22), method="linear"))
    return op.nn.softmax(e(op.nn.prelu(resized, const(4))), 1)


def shuffle(e, x):
    y = e(op.nn.conv2d(x, const(8, 3, 1, 1)))
    y = e(op.permute_dims(e(op.reshape(y, (1, 2, 4, 12, 12))), [0, 2, 1, 3, 4]))
    return op.nn.conv2d(e(op.reshape(y, (1, 8, 12, 12))), const(4, 8, 1, 1))


def norm_over_channels(e, x):
    y = e(op.permute_dims(e(op.nn.conv2d(x, const(8, 3, 3, 3))), [0, 2, 3, 1]))
    y = e(op.nn.layer_norm(y, const(8), const(8), axes=-1))
    return op.mean(e(op.nn.conv2d(e(op.permute_dims(y, [0, 3, 1, 2])), const(4, 8, 1, 1))), [2, 3])


def test_batch_norm_is_folded():
    gamma, beta, mean, variance = (
        relax.const(np.abs(RNG.standard_normal(4)).astype(np.float32)) for _ in range(4)
    )

    def emit(e, x):
        y = e(op.nn.conv2d(x, const(4, 3, 3, 3)))
        y = e(op.nn.batch_norm(y, gamma, beta, mean, variance, axis=1, training=False))
        return op.nn.relu(e(relax.TupleGetItem(y, 0)))

    mod = build((1, 3, 6, 6), emit)
    canonical = prepare(mod)
    assert sorted(set(operators(canonical))) == [
        "relax.add", "relax.nn.conv2d", "relax.nn.relu", "relax.permute_dims",
    ]  # fmt: skip
    x = RNG.standard_normal((1, 3, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(
        evaluate(canonical, {"x": x})[0], evaluate(mod, {"x": x})[0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("emit, permutes", [(everything_follows, 2), (shuffle, 5), (norm_over_channels, 1)])
def test_operators_follow(emit, permutes):
    test_the_numbers_stay(emit, permutes)


def test_one_dimensional_networks():
    def emit(e, x):
        y = e(op.nn.conv1d(x, const(8, 6, 5), strides=2, padding=2))
        y = e(op.nn.relu(e(op.add(e(op.multiply(y, const(8, 1))), const(1, 8, 1)))))
        y = e(op.nn.avg_pool1d(e(op.nn.max_pool1d(y, 2, 2)), 3, 1, 1, count_include_pad=False))
        y = e(op.nn.conv1d_transpose(y, const(8, 4, 3), strides=2, padding=1, output_padding=1))
        return op.mean(e(op.nn.silu(y)), 2)

    mod = build((2, 6, 40), emit)
    canonical = prepare(mod)
    x = RNG.standard_normal((2, 6, 40)).astype(np.float32)
    np.testing.assert_allclose(
        evaluate(canonical, {"x": x})[0], evaluate(mod, {"x": x})[0], rtol=1e-4, atol=1e-4
    )
    names = operators(canonical)
    assert names.count("relax.permute_dims") == 1 and not [name for name in names if "1d" in name]


@pytest.mark.parametrize("axes", [[1], [2], [3], [1, 2], [2, 3], [1, 3], [1, 2, 3], [0, 2, 3]])
@pytest.mark.parametrize("keepdims", [True, False])
def test_reductions(axes, keepdims):
    def emit(e, x):
        return op.sum(e(op.nn.conv2d(x, const(4, 3, 3, 3))), axes, keepdims)

    mod = build((2, 3, 6, 5), emit)
    x = RNG.standard_normal((2, 3, 6, 5)).astype(np.float32)
    got, expected = evaluate(prepare(mod), {"x": x})[0], evaluate(mod, {"x": x})[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_weights_of_channels_last_models_are_turned():
    def emit(e, x):
        return op.nn.conv2d(x, const(3, 3, 5, 4), data_layout="NHWC", kernel_layout="HWIO")

    mod = build((1, 6, 6, 5), emit)
    canonical = prepare(mod)
    call = canonical["main"].body.blocks[0].bindings[0].value
    assert str(call.attrs.kernel_layout) == "OHWI" and operators(canonical) == ["relax.nn.conv2d"]


def tokens_as_image(e, x):
    """As transformers of images make a map of their tokens, to resize it."""
    columns = e(op.permute_dims(e(op.reshape(x, (2, 6, 5))), [0, 2, 1]))
    return e(op.image.resize2d(e(op.reshape(columns, (2, 5, 2, 3))), (4, 6), layout="NCHW", method="linear"))


def turned_image(e, x):
    image = e(op.permute_dims(e(op.reshape(x, (2, 2, 3, 5))), [0, 3, 1, 2]))
    return e(op.image.resize2d(image, (4, 6), layout="NCHW", method="linear"))


@pytest.mark.parametrize("emit", [tokens_as_image, turned_image])
def test_images_of_tokens_stay_channels_last(emit):
    def net(e, x):
        image = emit(e, x)
        return op.nn.conv2d(e(op.concat([image, e(op.abs(image))], axis=1)), const(4, 10, 1, 1))

    for whole, permutes in ((net, 1), (emit, 1)):  # back to the file's layout at the end
        mod = build((2, 30), whole)
        x = RNG.standard_normal((2, 30)).astype(np.float32)
        canonical = prepare(mod)
        assert operators(canonical).count("relax.permute_dims") == permutes
        np.testing.assert_allclose(
            evaluate(canonical, {"x": x})[0], evaluate(mod, {"x": x})[0], rtol=1e-5, atol=1e-5
        )
