"""Sorting and cumulative operators, which TVM lowers apart from the others."""

import numpy as np
from relax_programs import build, random
from tvm import relax
from tvm.relax import op as R

import tvm_qfp8 as q


def test_sorts_and_scans_compile():
    def body(emit, x):
        values, order = (emit(part) for part in emit(R.topk(x, 3, axis=1, dtype="int64")))
        results = [
            values,
            order,
            R.sort(x, 1),
            R.argsort(x, 0, descending=True, dtype="int64"),
            R.cumsum(x, 1),
        ]
        return relax.Tuple([emit(result) for result in results])

    x = random(4, 9)
    values, order, ascending, descending, sums = q.compile(build({"x": ((4, 9), "float32")}, body))(x)
    largest = np.argsort(-x, axis=1)[:, :3]
    np.testing.assert_array_equal(order, largest)
    np.testing.assert_array_equal(values, np.take_along_axis(x, largest, 1))
    np.testing.assert_array_equal(ascending, np.sort(x, 1))
    np.testing.assert_array_equal(descending, np.argsort(-x, axis=0))
    np.testing.assert_allclose(sums, np.cumsum(x, 1), rtol=1e-5, atol=1e-6)
