"""Of dense layers and products only what is read later is computed."""

import numpy as np
import pytest
from relax_programs import build, constant, random
from tvm import relax
from tvm.relax import op as R

import tvm_qfp8
from tvm_qfp8.calibration import evaluate
from tvm_qfp8.relay_passes.drop_unread import DropUnread
from tvm_qfp8.relay_passes.fuse import op_name, shape_of
from tvm_qfp8.relay_passes.prepare import prepare

TOKENS, WIDTH, HEADS = 24, 32, 2


def indices(*values):
    return relax.const(np.array(values, np.int64))


def first_token(emit, x, index=0):
    return emit(R.take(x, relax.const(index, "int64"), axis=1, mode="wrap"))


def block(emit, x, tokens=TOKENS):
    """A transformer's block."""

    def heads(name, axes):
        dense = emit(R.matmul(x, constant(WIDTH, WIDTH, seed=name, scale=0.1)))
        return emit(R.permute_dims(emit(R.reshape(dense, (1, tokens, HEADS, WIDTH // HEADS))), axes))

    scores = emit(R.matmul(heads(1, [0, 2, 1, 3]), heads(2, [0, 2, 3, 1])))
    mixed = emit(R.matmul(emit(R.nn.softmax(scores)), heads(3, [0, 2, 1, 3])))
    together = emit(R.reshape(emit(R.permute_dims(mixed, [0, 2, 1, 3])), (1, tokens, WIDTH)))
    y = emit(R.add(x, emit(R.matmul(together, constant(WIDTH, WIDTH, seed=4, scale=0.2)))))
    normal = emit(R.nn.layer_norm(y, constant(WIDTH, seed=5), constant(WIDTH, seed=6), [-1]))
    inner = emit(R.nn.gelu(emit(R.matmul(normal, constant(WIDTH, 48, seed=7, scale=0.2)))))
    return emit(R.add(normal, emit(R.matmul(inner, constant(48, WIDTH, seed=8, scale=0.2)))))


def network(body, *shape):
    return build({"x": (shape or (1, TOKENS, WIDTH), "float32")}, body)


def rows_of_products(mod):
    found = [b.value for b in mod["main"].body.blocks[0].bindings if op_name(b.value) == "relax.matmul"]
    return [shape_of(value)[-2] for value in found]


def check(mod, shape=(1, TOKENS, WIDTH)):
    """The program with less in it; the results are the same."""
    fewer = DropUnread()(mod)
    for seed in range(2):
        x = {"x": random(*shape, seed=seed)}
        for found, expected in zip(evaluate(fewer, x), evaluate(mod, x), strict=True):
            assert found.shape == expected.shape and found.dtype == expected.dtype
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    return fewer


@pytest.mark.parametrize("index", [0, 7, -1])
def test_a_classifier_computes_one_token_of_its_last_block(index):
    def body(emit, x):
        first = first_token(emit, block(emit, block(emit, x)), index)
        return emit(R.matmul(first, constant(WIDTH, 5, seed=9)))

    # In order of the program: queries, keys, scores, values, mixed, and the dense layers after them.
    rows = rows_of_products(check(network(body)))
    assert rows == [TOKENS] * 8 + [1, TOKENS, 1, TOKENS, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "selection, left",
    [
        (lambda x: R.strided_slice(x, [1], [0], [4]), 4),
        (lambda x: R.strided_slice(x, [1], [-3], [TOKENS]), 3),
        (lambda x: R.strided_slice(x, [1], [1], [24], [4]), 6),
        (lambda x: R.take(x, indices(5, 2, 5, -1), axis=1, mode="wrap"), 3),
        (lambda x: R.take(x, relax.const(np.array([[1, 2], [2, 9]])), axis=-2, mode="wrap"), 3),
        (lambda x: R.strided_slice(x, [1], [0], [12]), 12),
        (lambda x: R.strided_slice(x, [1], [0], [13]), TOKENS),  # more than half
        (lambda x: R.strided_slice(x, [1], [23], [0], [-1]), TOKENS),  # in another order
        (lambda x: R.take(x, indices(1, 2), axis=1, mode="clip"), TOKENS),
        (lambda x: R.take(x, indices(), axis=1, mode="wrap"), TOKENS),
        (lambda x: R.mean(x, [1]), TOKENS),
    ],
)
def test_selections_of_rows(selection, left):
    def body(emit, x):
        dense = emit(R.add(emit(R.matmul(x, constant(WIDTH, 7))), constant(7, seed=1)))
        return emit(selection(emit(R.nn.relu(dense))))

    assert rows_of_products(check(network(body))) == [left]


def test_several_readers_have_all_that_one_of_them_reads():
    def body(emit, x):
        dense = emit(R.nn.relu(emit(R.matmul(x, constant(WIDTH, 7)))))
        last = emit(R.strided_slice(dense, [1], [TOKENS - 2], [TOKENS]))
        return emit(R.concat([emit(R.negative(last)), emit(R.take(dense, indices(3, 0), 1, mode="wrap"))], 1))

    assert rows_of_products(check(network(body))) == [4]


def test_what_is_a_result_is_whole():
    def body(emit, x):
        dense = emit(R.matmul(x, constant(WIDTH, 7)))
        return relax.Tuple([dense, first_token(emit, emit(R.matmul(dense, constant(7, 7))))])

    assert rows_of_products(check(network(body))) == [TOKENS, 1]


def test_what_no_product_computes_stays_where_it_is():
    def body(emit, x):
        return first_token(emit, emit(R.nn.relu(emit(R.exp(x)))))

    operators = [op_name(b.value) for b in check(network(body))["main"].body.blocks[0].bindings]
    assert operators[:3] == ["relax.exp", "relax.nn.relu", "relax.take"]


def test_columns_of_a_table_that_no_index_names_go():
    """Relative positions: of row i and column j the product with position j - i of the table."""
    offsets = 40 + np.arange(9)[None, :] - np.arange(9)[:, None]
    both = np.stack([offsets, offsets[::-1] - 80])  # from the end, too

    def body(emit, x):
        product = emit(R.matmul(x, constant(2, WIDTH, 80)))
        return emit(R.gather_elements(emit(R.divide(product, relax.const(3.0))), relax.const(both), axis=-1))

    fewer = check(network(body, 2, 9, WIDTH), (2, 9, WIDTH))
    (product,) = (
        b.value for b in fewer["main"].body.blocks[0].bindings if op_name(b.value) == "relax.matmul"
    )
    assert shape_of(product) == (2, 9, 17)


@pytest.mark.parametrize(
    "between",
    [
        lambda emit, y: emit(R.reshape(y, (TOKENS, 4, 8))),
        lambda emit, y: emit(R.squeeze(emit(R.expand_dims(y, [0, 2])), [0, 1])),
        lambda emit, y: emit(R.concat([y, emit(R.sigmoid(y))], 2)),
        lambda emit, y: emit(R.add(emit(R.broadcast_to(relax.const(np.float32(2)), (1, TOKENS, 1))), y)),
        lambda emit, y: emit(R.nn.rms_norm(y, constant(WIDTH), [-1])),
        lambda emit, y: emit(R.nn.log_softmax(y, -1)),
        lambda emit, y: emit(R.where(emit(R.greater(y, relax.const(0.0))), y, emit(R.square(y)))),
        lambda emit, y: emit(R.nn.prelu(y, constant(WIDTH), -1)),
        lambda emit, y: emit(R.concat([y, y], 1)),
        lambda emit, y: emit(R.reshape(y, (2, TOKENS // 2, WIDTH))),
        lambda emit, y: emit(R.nn.softmax(y, 1)),
    ],
)
def test_operators_between(between):
    def body(emit, x):
        y = between(emit, emit(R.matmul(x, constant(WIDTH, WIDTH, scale=0.2))))
        axis = next(axis for axis, extent in enumerate(shape_of(y)) if extent > 1)
        return emit(R.take(y, indices(1), axis=axis, mode="wrap"))

    check(network(body))


def test_a_compiled_classifier():
    def body(emit, x):
        first = first_token(emit, block(emit, block(emit, x)))
        return emit(R.matmul(first, constant(WIDTH, 5, seed=9)))

    mod = network(body)
    samples = [{"x": random(1, TOKENS, WIDTH, seed=seed)} for seed in range(8)]
    assert rows_of_products(prepare(mod))[-1] == 1
    for calibration in (samples, None):
        (found,) = tvm_qfp8.compile(mod, calibration=calibration).run(samples[0])
        (expected,) = evaluate(mod, samples[0])
        assert np.square(found - expected).sum() < 10**-2.5 * np.square(expected).sum()
