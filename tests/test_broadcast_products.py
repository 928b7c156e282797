"""Products that repeat an operand: rows of one product where that is possible, else copies."""

import numpy as np
import pytest
import tvm
from test_canonicalize import operators
from tvm import relax

import tvm_qfp8
from tvm_qfp8.calibration.evaluate import evaluate
from tvm_qfp8.relay_passes.broadcast_products import BroadcastProducts

RESHAPE, MATMUL, REPEAT = "relax.reshape", "relax.matmul", "relax.broadcast_to"


def program(x: tuple[int, ...], y: tuple[int, ...]) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    inputs = [relax.Var(name, relax.TensorType(shape, "float32")) for name, shape in (("x", x), ("y", y))]
    with builder.function("main", inputs, attrs={"num_input": 2}):
        with builder.dataflow():
            out = builder.emit_output(relax.op.matmul(*inputs))
        builder.emit_func_output(out)
    return builder.get()


def data(*shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in zip("xy", shapes, strict=True)
    }


@pytest.mark.parametrize(
    "x, y, expected",
    [
        ((2, 4, 3, 5), (2, 1, 5, 6), [RESHAPE, RESHAPE, MATMUL, RESHAPE]),
        ((2, 4, 3, 5), (1, 1, 5, 6), [RESHAPE, RESHAPE, MATMUL, RESHAPE]),
        ((2, 4, 3, 5), (5, 6), [RESHAPE, MATMUL, RESHAPE]),
        ((1, 4, 3, 5), (4, 5, 6), [RESHAPE, MATMUL]),
        ((2, 4, 3, 5), (4, 5, 6), [RESHAPE, REPEAT, MATMUL]),
        ((2, 1, 3, 5), (2, 4, 5, 6), [REPEAT, MATMUL]),
        ((3, 5), (2, 4, 5, 6), [RESHAPE, REPEAT, MATMUL]),
        ((1, 4, 3, 5), (2, 1, 5, 6), [RESHAPE, REPEAT, RESHAPE, MATMUL, RESHAPE]),
        ((2, 4, 3, 5), (2, 4, 5, 6), [MATMUL]),
        ((3, 5), (5, 6), [MATMUL]),
        ((5,), (2, 5, 6), [MATMUL]),
    ],
)
def test_what_is_repeated(x, y, expected):
    after = BroadcastProducts()(program(x, y))
    inputs = data(x, y)
    np.testing.assert_allclose(evaluate(after, inputs)[0], np.matmul(*inputs.values()), rtol=1e-5, atol=1e-5)
    assert sorted(operators(after)) == sorted(expected)


def test_queries_of_all_heads_meet_one_key():
    """The product is one of ours, in codes where there are samples."""
    x, y = (1, 4, 12, 16), (1, 1, 16, 8)
    rng = np.random.default_rng(1)
    inputs = data(x, y)
    samples = [
        {n: rng.standard_normal(a.shape).astype(np.float32) for n, a in inputs.items()} for _ in range(4)
    ]
    module = tvm_qfp8.compile(program(x, y), target="native", calibration=samples)
    (layer,) = module.report.layers
    assert layer.operator == "matmul" and "QFP8" in layer.became
    found, expected = module.run(inputs)[0], np.matmul(*inputs.values())
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize(
    "x, y", [((0, 4, 3, 5), (0, 1, 5, 6)), ((2, 4, 3, 5), (2, 1, 5, 0)), ((1, 4, 3, 0), (1, 1, 0, 6))]
)
def test_extents_of_zero(x, y):
    inputs = data(x, y)
    found, expected = tvm_qfp8.compile(program(x, y)).run(inputs)[0], np.matmul(*inputs.values())
    np.testing.assert_array_equal(found, expected)
