"""Reshapes around dense layers move out of the way, and the numbers stay."""

import numpy as np
import pytest
import tvm
from tvm import relax

from tvm_qfp8.relay_passes.fuse import op_name
from tvm_qfp8.relay_passes.simplify_views import SimplifyViews
from tvm_qfp8.relay_passes.sink_reshapes import SinkReshapes


def build(shape, emit):
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x], attrs={"num_input": 1}):
        with builder.dataflow():
            output = builder.emit_output(emit(builder, x))
        builder.emit_func_output(output)
    return builder.get()


def operators(mod) -> list[str]:
    """Of the calls in order; names given to the same value are left out."""
    values = [b.value for block in mod["main"].body.blocks for b in block.bindings]
    return [op_name(value).split(".")[-1] for value in values if op_name(value)]


def evaluate(mod, x):
    mod = relax.transform.LegalizeOps()(mod)
    return relax.VirtualMachine(tvm.compile(mod, target="llvm"), tvm.cpu())["main"](
        tvm.runtime.tensor(x)
    ).numpy()


RNG = np.random.default_rng(0)
W, B = RNG.standard_normal((8, 12), np.float32), RNG.standard_normal(12, np.float32)


def flattened_around_dense(b, x):
    flat = b.emit(relax.op.reshape(x, (6, 8)))
    y = b.emit(relax.op.add(b.emit(relax.op.matmul(flat, relax.const(W))), relax.const(B.reshape(1, 12))))
    return b.emit(relax.op.nn.gelu(b.emit(relax.op.reshape(y, (2, 3, 12)))))


def heads_joined(b, x):
    heads = b.emit(relax.op.reshape(x, (2, 3, 2, 4)))
    moved = b.emit(relax.op.nn.relu(heads))
    flat = b.emit(relax.op.reshape(moved, (6, 8)))
    y = b.emit(relax.op.matmul(flat, relax.const(W)))
    return b.emit(relax.op.reshape(y, (2, 3, 12)))


@pytest.mark.parametrize("emit", [flattened_around_dense, heads_joined])
def test_no_reshape_stays_behind_the_dense_layer(emit):
    mod = build((2, 3, 8), emit)
    after = SimplifyViews()(SinkReshapes()(mod))
    names = operators(after)
    assert "reshape" not in names[names.index("matmul") :]
    x = RNG.standard_normal((2, 3, 8), np.float32)
    np.testing.assert_allclose(evaluate(after, x), evaluate(mod, x), rtol=1e-5, atol=1e-6)


def test_a_reshape_of_the_last_axis_stays():
    def emit(b, x):
        flat = b.emit(relax.op.reshape(x, (3, 8)))
        return b.emit(relax.op.matmul(flat, relax.const(W)))

    mod = build((2, 3, 4), emit)
    assert operators(SimplifyViews()(SinkReshapes()(mod))) == ["reshape", "matmul"]


def test_a_number_of_int64_stays_one():
    def emit(b, x):
        counts = b.emit(relax.op.astype(x, "int64"))
        flat = b.emit(relax.op.reshape(counts, (6, 8)))
        return b.emit(relax.op.add(flat, relax.const(np.array([[2100]]), "int64")))

    mod = build((2, 3, 8), emit)
    x = RNG.integers(-9, 9, (2, 3, 8)).astype(np.float32)
    after = evaluate(SimplifyViews()(SinkReshapes()(mod)), x)
    assert after.dtype == np.int64
    np.testing.assert_array_equal(after, evaluate(mod, x))
