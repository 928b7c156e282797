"""What never holds a negative value is known without samples."""

import numpy as np
import pytest
from relax_programs import build, random
from tvm import relax
from tvm.relax import op as R

from tvm_qfp8.calibration.evaluate import Program
from tvm_qfp8.calibration.nonnegative import nonnegative

ABOVE = relax.const(np.array([0.5, 0.0, 2.0, 1.0], np.float32))
BELOW = relax.const(np.array([0.5, 0.0, -2.0, 1.0], np.float32))


def part(emit, x, index):
    return emit(relax.TupleGetItem(emit(R.split(x, 2, axis=1)), index))


CASES = {
    "relu": (lambda emit, x: R.nn.relu(x), True),
    "tanh": (lambda emit, x: R.tanh(x), False),
    "relu6": (lambda emit, x: R.clip(x, 0, 6), True),
    "hardtanh": (lambda emit, x: R.clip(x, -1, 1), False),
    "clip of what is above zero": (lambda emit, x: R.clip(emit(R.abs(x)), -1, 1), True),
    "clip to what is below zero": (lambda emit, x: R.clip(emit(R.abs(x)), -2, -1), False),
    "sum": (lambda emit, x: R.add(emit(R.abs(x)), emit(R.sigmoid(x))), True),
    "sum with a negative number": (lambda emit, x: R.add(emit(R.abs(x)), BELOW), False),
    "difference": (lambda emit, x: R.subtract(emit(R.abs(x)), emit(R.sigmoid(x))), False),
    "product with a constant": (lambda emit, x: R.multiply(emit(R.exp(x)), ABOVE), True),
    "product with negative": (lambda emit, x: R.multiply(emit(R.exp(x)), BELOW), False),
    "maximum with a constant": (lambda emit, x: R.maximum(x, ABOVE), True),
    "minimum": (lambda emit, x: R.minimum(emit(R.abs(x)), x), False),
    "concatenation": (lambda emit, x: R.concat([emit(R.abs(x)), emit(R.square(x))], axis=1), True),
    "concatenation with x": (lambda emit, x: R.concat([emit(R.abs(x)), x], axis=1), False),
    "part": (lambda emit, x: R.reshape(part(emit, emit(R.abs(x)), 1), (4,)), True),
    "part of x": (lambda emit, x: R.reshape(part(emit, x, 1), (4,)), False),
    "mean": (lambda emit, x: R.mean(emit(R.nn.softmax(x)), axis=1), True),
    "rows of a table": (lambda emit, x: R.take(ABOVE, emit(R.astype(x, "int32")), axis=0), True),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_numbers_say(name):
    make, expected = CASES[name]
    program = Program(build({"x": ((2, 4), "float32")}, lambda emit, x: emit(make(emit, x))))
    values = {"x": np.abs(random(2, 4)) if name.startswith("rows") else random(2, 4)}
    for step in program.steps:
        values[step.name] = step.run(values)
    found = nonnegative(program)
    assert (program.steps[-1].name in found) == expected
    for known in found:
        assert np.min(values[known]) >= 0
