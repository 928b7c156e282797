"""Products with one-hot rows are lookups, and what is done to rows of a lookup is done to its table."""

from __future__ import annotations

import numpy as np
import pytest
import relax_programs
from models import model
from onnx import TensorProto, helper
from test_recognize import const, operators
from tvm import relax, tirx

import tvm_qfp8
from tvm_qfp8.calibration import evaluate
from tvm_qfp8.importers import load_model
from tvm_qfp8.relay_passes.fold_lookups import FoldLookups
from tvm_qfp8.relay_passes.one_hot_lookups import OneHotLookups
from tvm_qfp8.relay_passes.prepare import prepare

op = relax.op
DEPTH, WIDTH = 21, 16
TABLE = np.random.default_rng(0).standard_normal((DEPTH, WIDTH)).astype(np.float32)
INDICES = np.array([[0, 5, 20, 21, -1, 7], [3, 3, 99, 0, -21, 20]])
PLACES = np.arange(DEPTH)


def build(emit, dtype="int32", shape=INDICES.shape):
    return relax_programs.build({"x": (shape, dtype)}, emit)


def compared(e, x, places=PLACES):
    """As JAX writes one-hot rows."""
    column = e(op.expand_dims(x, -1))
    return e(op.astype(e(op.equal(column, relax.const(places[None, None], str(x.ty.dtype)))), "float32"))


def one_hot(e, x):
    return e(op.one_hot(x, tirx.FloatImm("float32", 1.0), tirx.FloatImm("float32", 0.0), DEPTH))


def outputs(mod, dtype, x=INDICES):
    return evaluate(mod, {"x": x.astype(dtype)})[0]


@pytest.mark.parametrize("rows", [compared, one_hot])
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_one_hot_rows_are_looked_up(rows, dtype):
    mod = build(lambda e, x: op.matmul(rows(e, x), const(TABLE)), dtype)
    found = OneHotLookups()(mod)
    assert "relax.take" in operators(found) and "relax.matmul" not in operators(found)
    expected = outputs(mod, dtype)
    np.testing.assert_array_equal(outputs(found, dtype), expected)
    inside = (INDICES >= 0) & (INDICES < DEPTH)
    np.testing.assert_array_equal(expected, np.where(inside[..., None], TABLE[INDICES % DEPTH], 0))


def shuffled(e, x):
    return compared(e, x, PLACES[::-1].copy())


def two_values(e, x):
    return e(op.one_hot(x, tirx.FloatImm("float32", 2.0), tirx.FloatImm("float32", 0.0), DEPTH))


def other_axis(e, x):
    rows = e(op.one_hot(x, tirx.FloatImm("float32", 1.0), tirx.FloatImm("float32", 0.0), DEPTH, axis=0))
    return e(op.reshape(rows, (*INDICES.shape, DEPTH)))


@pytest.mark.parametrize("rows", [shuffled, two_values, other_axis])
def test_other_rows_stay_products(rows):
    found = OneHotLookups()(build(lambda e, x: op.matmul(rows(e, x), const(TABLE))))
    assert "relax.matmul" in operators(found)


def test_what_follows_a_lookup_is_done_to_the_table():
    bias = np.random.default_rng(1).standard_normal(WIDTH).astype(np.float32)

    def emit(e, x):
        rows = e(op.take(const(TABLE), x, axis=0, mode="wrap"))
        return op.nn.gelu(e(op.add(e(op.multiply(rows, const(2.0))), const(bias))))

    def reshaped(e, x):
        return op.nn.relu(e(op.reshape(e(emit(e, x)), (2 * DEPTH, WIDTH))))

    indices = np.random.default_rng(2).integers(0, DEPTH, (2, DEPTH))
    flat = FoldLookups()(build(reshaped, shape=indices.shape))
    assert operators(flat) == ["relax.reshape", "relax.take"]
    expected = outputs(build(reshaped, shape=indices.shape), "int32", indices)
    np.testing.assert_array_equal(outputs(flat, "int32", indices), expected)
    mod = build(emit, shape=indices.shape)
    found = FoldLookups()(mod)
    assert operators(found) == ["relax.take"]
    np.testing.assert_array_equal(outputs(found, "int32", indices), outputs(mod, "int32", indices))


def long_table(e, x):
    return op.nn.gelu(e(op.take(const(TABLE), x, axis=0, mode="wrap")))


def bias_of_places(e, x):
    rows = e(op.take(const(TABLE[:2]), x, axis=0, mode="wrap"))
    return op.add(rows, const(np.ones((INDICES.shape[1], WIDTH))))


def read_twice(e, x):
    rows = e(op.take(const(TABLE[:2]), x, axis=0, mode="wrap"))
    return op.add(e(op.nn.relu(rows)), rows)


@pytest.mark.parametrize("emit", [long_table, bias_of_places, read_twice])
def test_what_is_more_than_a_change_of_a_short_table_stays(emit):
    mod = build(emit)
    assert operators(FoldLookups()(mod)) == operators(mod)


def test_an_embedding_of_one_hot_rows_compiles():
    rng = np.random.default_rng(3)
    weights = {
        "places": PLACES.reshape(1, 1, DEPTH).astype(np.int32),
        "table": TABLE,
        "bias": rng.standard_normal(WIDTH).astype(np.float32),
        "w": rng.standard_normal((WIDTH, 8)).astype(np.float32),
        "axis": np.array([2]),
    }
    nodes = [
        helper.make_node("Cast", ["x"], ["indices"], to=TensorProto.INT32),
        helper.make_node("Unsqueeze", ["indices", "axis"], ["column"]),
        helper.make_node("Equal", ["column", "places"], ["same"]),
        helper.make_node("Cast", ["same"], ["rows"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["rows", "table"], ["embedded"]),
        helper.make_node("Add", ["embedded", "bias"], ["shifted"]),
        helper.make_node("Relu", ["shifted"], ["positive"]),
        helper.make_node("MatMul", ["positive", "w"], ["y"]),
    ]
    indices = rng.integers(0, DEPTH, (1, 40)).astype(np.int32)
    network = model(nodes, {"x": indices.shape}, {"y": (1, 40, 8)}, weights)
    found = operators(prepare(load_model(network).mod))
    assert found.count("relax.matmul") == found.count("relax.take") == 1
    assert not {"relax.equal", "relax.add", "relax.nn.relu"} & set(found)
    module = tvm_qfp8.compile(network)
    expected = np.maximum(TABLE[indices] + weights["bias"], 0) @ weights["w"]
    (got,) = module.run({"x": indices.astype(np.float32)})
    error = ((got - expected) ** 2).sum() / (expected**2).sum()
    assert error < 1e-3
