"""Values between 0 and a limit that they reach are known without samples."""

import pytest
from relax_programs import build
from tvm import relax
from tvm.relax import op as R

from tvm_qfp8.calibration.evaluate import Program
from tvm_qfp8.calibration.saturation import saturated

CASES = {
    "relu6": (lambda emit, x: R.clip(x, 0, 6), 6.0),
    "sigmoid": (lambda emit, x: R.sigmoid(x), 1.0),
    "moved": (lambda emit, x: R.reshape(emit(R.clip(x, 0, 6)), (8,)), 6.0),
    "joined": (lambda emit, x: R.concat([emit(R.clip(x, 0, 6)), emit(R.sigmoid(x))], axis=1), 6.0),
    "part": (lambda emit, x: relax.TupleGetItem(emit(R.split(emit(R.sigmoid(x)), 2, axis=1)), 1), 1.0),
    "joined with others": (lambda emit, x: R.concat([emit(R.clip(x, 0, 6)), x], axis=1), None),
    "relu": (lambda emit, x: R.nn.relu(x), None),
    "hardtanh": (lambda emit, x: R.clip(x, -1, 1), None),
    "from above zero": (lambda emit, x: R.clip(x, 0.5, 6), None),
    "a guard": (lambda emit, x: R.clip(x, 0, 65504), None),
    "mean": (lambda emit, x: R.mean(emit(R.clip(x, 0, 6)), axis=1), None),
    "softmax": (lambda emit, x: R.nn.softmax(x), None),
    "product": (lambda emit, x: R.multiply(emit(R.sigmoid(x)), emit(R.sigmoid(x))), None),
}


@pytest.mark.parametrize("name", CASES)
def test_limit(name):
    make, limit = CASES[name]
    program = Program(build({"x": ((2, 4), "float32")}, lambda emit, x: emit(make(emit, x))))
    assert saturated(program).get(program.steps[-1].name) == limit
