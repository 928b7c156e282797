"""Passes that bring a program to canonical form: the IR before and after, and the numbers."""

import numpy as np
import pytest
import tvm
from test_recognize import operators
from tvm import relax, te, tirx

from tvm_qfp8.calibration import evaluate
from tvm_qfp8.relay_passes.canonicalize import Canonicalize
from tvm_qfp8.relay_passes.constants_right import ConstantsRight
from tvm_qfp8.relay_passes.fold_batchnorm import FoldBatchnorm
from tvm_qfp8.relay_passes.fold_constants import FoldConstants
from tvm_qfp8.relay_passes.hoist_scales import HoistScales
from tvm_qfp8.relay_passes.lift_clip import LiftClip
from tvm_qfp8.relay_passes.matmul_broadcasts import MatmulBroadcasts
from tvm_qfp8.relay_passes.prepare import prepare
from tvm_qfp8.relay_passes.simplify_views import SimplifyViews

op = relax.op
RNG = np.random.default_rng(5)


def const(value):
    return relax.const(np.asarray(value, np.float32))


def random(*shape):
    return const(RNG.standard_normal(shape))


def build(emit, shape=(2, 3, 4, 5)):
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            output = builder.emit_output(emit(builder.emit, x))
        builder.emit_func_output(output)
    return builder.get()


def check(emit, expected, passes, shape=(2, 3, 4, 5), rtol=1e-6):
    """The passes leave ``expected`` operators and the same numbers."""
    mod = build(emit, shape)
    after = tvm.transform.Sequential([passes, relax.transform.DeadCodeElimination()])(mod)
    assert operators(after) == expected
    x = RNG.standard_normal(shape).astype(np.float32) * 4
    np.testing.assert_allclose(evaluate(after, {"x": x})[0], evaluate(mod, {"x": x})[0], rtol=rtol, atol=rtol)
    return after


NOTHING = {
    "add 0": lambda e, x: op.add(x, const(np.zeros((3, 1, 1)))),
    "0 + x": lambda e, x: op.add(const(0), x),
    "subtract 0": lambda e, x: op.subtract(x, const(0)),
    "1 * x": lambda e, x: op.multiply(const(1), x),
    "divide by 1": lambda e, x: op.divide(x, const(np.ones((1, 3, 1, 1)))),
    "power 1": lambda e, x: op.power(x, const(1)),
    "reshape": lambda e, x: op.reshape(x, (2, 3, 4, 5)),
    "cast": lambda e, x: op.astype(x, "float32"),
    "permute": lambda e, x: op.permute_dims(x, [0, 1, 2, -1]),
    "broadcast": lambda e, x: op.broadcast_to(x, (2, 3, 4, 5)),
    "slice": lambda e, x: op.strided_slice(x, [1], [0], [3]),
    "concat": lambda e, x: op.concat([x], 1),
    "concat of nothing more": lambda e, x: op.concat([e(op.strided_slice(x, [1], [3], [3])), x], 1),
    "pad": lambda e, x: op.nn.pad(x, [0] * 8),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_does_nothing_goes(name):
    check(lambda e, x: op.negative(e(NOTHING[name](e, x))), ["relax.negative"], Canonicalize())


@pytest.mark.parametrize(
    "emit, expected",
    [
        (lambda e, x: op.subtract(const(0), x), "relax.subtract"),
        (lambda e, x: op.divide(const(1), x), "relax.divide"),
        (lambda e, x: op.add(x, const([0, 0, 0, 0, 1])), "relax.add"),
        (lambda e, x: op.strided_slice(x, [1], [2], [-4], [-1]), "relax.strided_slice"),
        (lambda e, x: op.multiply(x, const(np.ones((3, 1, 1, 1, 1)))), "relax.multiply"),
        (lambda e, x: op.nn.pad(x, [0, 0, 0, 0, 0, 0, 1, -1]), "relax.nn.pad"),
    ],
)
def test_what_does_something_stays(emit, expected):
    check(emit, [expected], Canonicalize())


@pytest.mark.parametrize(
    "emit, expected",
    [
        (lambda e, x: op.minimum(e(op.maximum(x, const(0))), const(6)), "relax.clip"),
        (lambda e, x: op.maximum(const(-1), e(op.minimum(const(2), x))), "relax.clip"),
        (lambda e, x: op.minimum(e(op.nn.relu(x)), const(6)), "relax.clip"),
        (lambda e, x: op.maximum(x, const(0)), "relax.nn.relu"),
        (lambda e, x: op.clip(e(op.clip(x, -3, 1)), 0, 2), "relax.clip"),
        (lambda e, x: op.clip(e(op.clip(x, -3, -2)), 0, 2), "relax.clip"),
        (lambda e, x: op.nn.relu(e(op.nn.relu(x))), "relax.nn.relu"),
        (lambda e, x: op.minimum(x, const(1.5)), "relax.minimum"),
        (lambda e, x: op.minimum(x, const([1, 2, 3, 4, 5])), "relax.minimum"),
    ],
)
def test_bounds(emit, expected):
    check(emit, [expected], Canonicalize())


@pytest.mark.parametrize("exponent, expected", [(2, "square"), (0.5, "sqrt"), (-0.5, "rsqrt"), (3, "power")])
def test_powers(exponent, expected):
    check(
        lambda e, x: op.power(e(op.abs(x)), const(exponent)),
        ["relax.abs", f"relax.{expected}"],
        Canonicalize(),
        rtol=1e-5,
    )


@pytest.mark.parametrize("inside", [True, False])
def test_clip_kernels_become_operators(inside):
    def emit(e, x):
        def call(kind, data, bound):
            function = tirx.max if kind == "maximum" else tirx.min

            def compute(a, b=None):
                limit = tirx.const(bound, "float32")
                return te.compute(a.shape, lambda *i: function(a(*i), limit if b is None else b()), name=kind)

            return builder.emit_te(compute, data, *([] if inside else [const(bound)]))

        return call("minimum", call("maximum", x, 0.0), 6.0)

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 3), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            output = builder.emit_output(emit(builder.emit, x))
        builder.emit_func_output(output)
    mod = tvm.transform.Sequential([LiftClip(), Canonicalize(), relax.transform.DeadCodeElimination()])(
        builder.get()
    )
    assert operators(mod) == ["relax.clip"]
    x = np.array([[-1, 0, 3], [6, 7, 5]], np.float32)
    np.testing.assert_array_equal(evaluate(mod, {"x": x})[0], np.clip(x, 0, 6))


def test_views_that_cancel():
    def emit(e, x):
        tokens = e(op.permute_dims(e(op.reshape(e(op.permute_dims(x, [0, 3, 1, 2])), (2, 5, 12))), [0, 2, 1]))
        return op.negative(e(op.expand_dims(tokens, 1)))

    check(emit, ["relax.reshape", "relax.negative"], SimplifyViews())
    back = lambda e, x: op.permute_dims(e(op.permute_dims(x, [0, 3, 1, 2])), [0, 2, 3, 1])  # noqa: E731
    check(lambda e, x: op.negative(e(back(e, x))), ["relax.negative"], SimplifyViews())


def test_views_that_do_not_cancel():
    swapped = lambda e, x: op.permute_dims(e(op.permute_dims(x, [0, 2, 1, 3])), [0, 1, 3, 2])  # noqa: E731
    check(swapped, ["relax.permute_dims"] * 2, SimplifyViews())
    heads = lambda e, x: op.permute_dims(e(op.reshape(x, (2, 3, 10, 2))), [0, 2, 1, 3])  # noqa: E731
    check(heads, ["relax.reshape", "relax.permute_dims"], SimplifyViews())


def affine(e, y, channels=4):
    """What is left of BatchNorm: minus mean, divided by the deviation, times gamma, plus beta."""
    y = e(op.subtract(y, random(channels)))
    y = e(op.divide(y, const(RNG.uniform(0.5, 2, channels))))
    return op.add(e(op.multiply(y, random(1, channels))), random(channels))


@pytest.mark.parametrize(
    "linear, shape",
    [
        (lambda x: op.matmul(x, random(5, 4)), (2, 3, 5)),
        (
            lambda x: op.nn.conv2d(x, random(4, 3, 3, 5), data_layout="NHWC", kernel_layout="OHWI"),
            (1, 6, 6, 5),
        ),
        (
            lambda x: op.nn.conv2d(x, random(4, 3, 3, 1), groups=4, data_layout="NHWC", kernel_layout="OHWI"),
            (1, 6, 6, 4),
        ),
        (
            lambda x: op.nn.conv2d_transpose(
                x, random(6, 2, 2, 2), strides=(2, 2), groups=2, data_layout="NHWC", kernel_layout="IOHW"
            ),
            (1, 3, 3, 6),
        ),
    ],
)
def test_scales_and_shifts_fold(linear, shape):
    def emit(e, x):
        y = e(op.subtract(const(1), e(op.add(e(linear(x)), random(4)))))
        return affine(e, y)

    names = operators(build(lambda e, x: linear(x), shape))
    check(emit, [*names, "relax.add"], FoldBatchnorm(), shape, rtol=1e-4)


def test_scales_that_cannot_fold():
    def read_twice(e, x):
        y = e(op.matmul(x, random(5, 4)))
        return op.add(e(op.multiply(y, random(4))), y)

    check(read_twice, ["relax.matmul", "relax.multiply", "relax.add"], FoldBatchnorm())
    along_rows = lambda e, x: op.multiply(e(op.matmul(x, random(5, 4))), random(4, 1))  # noqa: E731
    check(along_rows, ["relax.matmul", "relax.multiply"], FoldBatchnorm())
    inverse = lambda e, x: op.divide(random(4), e(op.matmul(x, random(5, 4))))  # noqa: E731
    check(inverse, ["relax.matmul", "relax.divide"], FoldBatchnorm())


def test_a_batchnorm_after_anything_is_one_product_and_one_sum():
    def pre_activation(e, x):
        y = e(op.divide(e(op.subtract(e(op.nn.relu(x)), random(5))), const([1, 2, 3, 4, -5])))
        return affine(e, y, 5)

    check(pre_activation, ["relax.nn.relu", "relax.multiply", "relax.add"], FoldBatchnorm(), rtol=1e-4)
    numbers = lambda e, x: op.divide(e(op.subtract(e(op.abs(x)), const(0.5))), const(3.0))  # noqa: E731
    check(numbers, ["relax.abs", "relax.subtract", "relax.divide"], FoldBatchnorm())


def heads(e, y):
    return e(op.permute_dims(e(op.reshape(y, (2, 12, 2, 2))), [0, 2, 1, 3]))


@pytest.mark.parametrize("by", ["multiply", "divide"])
def test_scales_of_heads_fold(by):
    """Attention scales its queries after they are cut into heads."""

    def emit(e, x):
        y = e(op.add(e(op.matmul(e(op.reshape(x, (2, 12, 5))), random(5, 4))), random(4)))
        scaled = getattr(op, by)(heads(e, y), const(0.25))
        return op.permute_dims(e(scaled), [0, 1, 3, 2])

    views = ["relax.reshape", "relax.permute_dims", "relax.permute_dims"]
    expected = ["relax.reshape", "relax.matmul", "relax.add", *views]
    check(emit, expected, tvm.transform.Sequential([HoistScales(), FoldBatchnorm()]), rtol=1e-4)


@pytest.mark.parametrize("by", ["multiply", "divide"])
def test_scales_of_products_fold(by):
    """Attention may as well scale the product of queries and keys."""
    weights = random(5, 4), random(5, 4)

    def emit(e, x):
        rows = e(op.reshape(x, (2, 12, 5)))
        queries, keys = (heads(e, e(op.matmul(rows, weight))) for weight in weights)
        return getattr(op, by)(e(op.matmul(queries, e(op.permute_dims(keys, [0, 1, 3, 2])))), const(0.25))

    views = ["relax.reshape", "relax.permute_dims"]
    keys = ["relax.matmul", *views, "relax.permute_dims"]
    expected = ["relax.reshape", "relax.matmul", *keys, *views, "relax.matmul"]
    check(emit, expected, tvm.transform.Sequential([HoistScales(), FoldBatchnorm()]), rtol=1e-4)


def test_scales_that_stay_where_they_are():
    def shared(e, x):
        y = e(op.matmul(e(op.reshape(x, (2, 12, 5))), random(5, 4)))
        cut = heads(e, y)
        return op.add(e(op.multiply(cut, const(0.25))), cut)

    expected = ["relax.reshape", "relax.matmul", "relax.reshape", "relax.permute_dims"]
    check(shared, [*expected, "relax.multiply", "relax.add"], HoistScales())
    nonlinear = lambda e, x: op.multiply(heads(e, e(op.tanh(random(2, 12, 4)))), const(0.5))  # noqa: E731
    check(nonlinear, ["relax.tanh", "relax.reshape", "relax.permute_dims", "relax.multiply"], HoistScales())


def test_what_depends_on_a_shape_only_is_constant():
    filled = lambda e, x: op.add(x, e(op.full_like(e(op.negative(x)), const(2))))  # noqa: E731
    check(filled, ["relax.add"], FoldConstants())


def test_constants_fold():
    def emit(e, x):
        bias = e(op.reshape(random(3), (1, 3, 1, 1)))
        total = e(op.sum(e(op.concat([bias, bias], 0))))
        return op.add(e(op.add(x, bias)), total)

    after = check(emit, ["relax.add", "relax.add"], FoldConstants(), rtol=1e-5)
    assert "R.Tensor((), " not in str(after["main"].ret_ty)


def test_matrices_lose_dimensions_of_one():
    mod = prepare(build(lambda e, x: op.matmul(x, random(1, 1, 5, 4))))
    assert operators(mod) == ["relax.matmul"]
    call = mod["main"].body.blocks[0].bindings[0].value
    assert [int(extent) for extent in call.args[1].ty.shape] == [5, 4]


def test_names_stay_unique():
    def emit(e, x):
        y = e(op.nn.conv2d(x, random(4, 3, 3, 3)))
        return op.concat([e(op.nn.relu(y)), e(op.add(e(op.negative(y)), y))], 1)

    names = [b.var.name for b in prepare(build(emit))["main"].body.blocks[0].bindings]
    assert len(names) == len(set(names))


def test_prelu_of_one_slope_is_leaky_relu():
    slopes = const(np.full(3, 0.25))
    check(lambda e, x: op.nn.prelu(x, slopes, axis=1), ["relax.nn.leakyrelu"], Canonicalize())


@pytest.mark.parametrize(
    "weight, shape, expected",
    [
        ((5, 6), (2, 3, 5, 6), ["relax.matmul"]),
        ((3, 5, 6), (2, 3, 5, 6), ["relax.matmul"]),
        ((1, 6), (2, 3, 5, 6), ["relax.broadcast_to", "relax.matmul"]),  # makes the matrix itself
        ((5, 6), (7, 2, 3, 5, 6), ["relax.broadcast_to", "relax.matmul"]),  # repeats the result
    ],
)
def test_a_weight_that_is_repeated_for_a_matmul_is_held_once(weight, shape, expected):
    w = random(*weight)
    check(lambda e, x: op.matmul(x, e(op.broadcast_to(w, shape))), expected, MatmulBroadcasts())


@pytest.mark.parametrize("shape, left", [((3, 4, 5), (6, 4)), ((2, 3, 4, 5), (1, 6, 4)), ((4, 5), (6, 4))])
def test_a_constant_on_the_left_of_a_matmul_comes_to_the_right(shape, left):
    w = random(*left)
    expected = ["relax.permute_dims", "relax.matmul", "relax.permute_dims"]
    check(lambda e, x: op.matmul(w, x), expected, ConstantsRight(), shape, rtol=1e-5)


@pytest.mark.parametrize(
    "shape, left", [((3, 4, 5), (3, 6, 4)), ((4, 3), (4,)), ((4,), (6, 4)), ((4, 5), (1, 6, 4))]
)
def test_other_constants_on_the_left_stay(shape, left):
    w = random(*left)
    check(lambda e, x: op.matmul(w, x), ["relax.matmul"], ConstantsRight(), shape, rtol=1e-5)


@pytest.mark.parametrize("shape, weight", [((4, 0), (0, 3)), ((2, 4, 0), (2, 0, 3))])
def test_a_sum_of_no_products_is_zero(shape, weight):
    check(lambda e, x: op.matmul(x, random(*weight)), ["relax.zeros"], Canonicalize(), shape)


def test_an_activation_that_is_repeated_for_a_matmul():
    w = random(2, 3, 5, 6)
    check(
        lambda e, x: op.matmul(e(op.broadcast_to(x, (2, 3, 4, 5))), w),
        ["relax.matmul"],
        MatmulBroadcasts(),
        (4, 5),
    )
    w = random(5, 6)
    check(
        lambda e, x: op.matmul(e(op.broadcast_to(x, (2, 3, 4, 5))), w),
        ["relax.broadcast_to", "relax.matmul"],
        MatmulBroadcasts(),
        (4, 5),
    )
