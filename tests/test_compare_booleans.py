"""Comparisons of booleans, which TVM generates no code for."""

import numpy as np
from tvm import relax

import tvm_qfp8 as q
from tvm_qfp8.relay_passes.compare_booleans import LOGIC


def test_every_comparison_of_booleans_compiles():
    builder = relax.BlockBuilder()
    a, b = (relax.Var(name, relax.TensorType((4, 33), "int64")) for name in "ab")
    with builder.function("main", [a, b]):
        with builder.dataflow():
            one = relax.const(1, "int64")
            x, y = builder.emit(relax.op.greater(a, one)), builder.emit(relax.op.greater(b, one))
            compared = [getattr(relax.op, name.removeprefix("relax."))(x, y) for name in LOGIC]
            results = [relax.op.astype(builder.emit(value), "float32") for value in compared]
            output = builder.emit_output(relax.Tuple([builder.emit(result) for result in results]))
        builder.emit_func_output(output)
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 4, (2, 4, 33))
    for name, found in zip(LOGIC, q.compile(builder.get())(first, second), strict=True):
        expected = getattr(np, name.removeprefix("relax."))(first > 1, second > 1)
        np.testing.assert_array_equal(found, expected, err_msg=name)
