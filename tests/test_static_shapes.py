"""Programs whose shapes depend on data are refused in one line."""

import numpy as np
import pytest
from models import model
from onnx import TensorProto, helper

import tvm_qfp8
from tvm_qfp8.errors import UnsupportedOperatorError


def test_a_shape_that_depends_on_data():
    made = model(
        [
            helper.make_node("NonZero", ["x"], ["i"]),
            helper.make_node("Cast", ["i"], ["y"], to=TensorProto.FLOAT),
        ],
        {"x": (2, 3)},
        {"y": (2, "n")},
        {},
    )
    with pytest.raises(UnsupportedOperatorError, match="depends on the values of an input"):
        tvm_qfp8.compile(made)


def test_a_scalar_input_stays_a_scalar():
    made = model([helper.make_node("Mul", ["x", "s"], ["y"])], {"x": (2, 3), "s": ()}, {"y": (2, 3)}, {})
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    (got,) = tvm_qfp8.compile(made).run({"x": x, "s": np.array(2, np.float32)})
    np.testing.assert_array_equal(got, 2 * x)
