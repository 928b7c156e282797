"""Products of two activations: an exchange of the right operand's last axes is part of the product, rows may move."""

import numpy as np
import pytest
from quantized_programs import program
from tvm import relax

from tvm_qfp8.calibration import evaluate
from tvm_qfp8.calibration.plan import QuantizationPlan
from tvm_qfp8.compiler import compile
from tvm_qfp8.relay_passes.fuse import op_name
from tvm_qfp8.relay_passes.quantize_linear import QuantizeLinear

RNG = np.random.default_rng(0)
KEYS = {
    "last axes": ((1, 3, 10, 8), [0, 1, 3, 2], []),
    "heads and last axes": ((1, 10, 3, 8), [0, 2, 3, 1], [[0, 2, 1, 3]]),
    "rows moved only": ((1, 8, 3, 10), [0, 2, 1, 3], [[0, 2, 1, 3]]),
    "values of rows parted": ((8, 3, 1, 10), [2, 1, 0, 3], [[2, 1, 0, 3]]),
    "first axis last": ((10, 1, 3, 8), [1, 2, 3, 0], [[1, 2, 0, 3]]),
    "last axis first of all": ((10, 3, 8, 1), [3, 1, 2, 0], [[3, 1, 2, 0]]),
}


def scores(axes):
    return lambda builder, q, k: relax.op.matmul(q, builder.emit(relax.op.permute_dims(k, axes)))


@pytest.mark.parametrize("name", KEYS)
def test_scores(name):
    shape, axes, moved = KEYS[name]
    mod = program([((1, 3, 5, 8), None), (shape, None)], scores(axes))
    lowered = relax.transform.DeadCodeElimination()(QuantizeLinear(QuantizationPlan())(mod))
    values = [b.value for block in lowered["main"].body.blocks for b in block.bindings]
    found = [[int(a) for a in v.attrs.axes] for v in values if op_name(v) == "relax.permute_dims"]
    assert found == moved
    shapes = {"x0": (1, 3, 5, 8), "x1": shape}
    samples = [{n: RNG.standard_normal(s).astype(np.float32) for n, s in shapes.items()} for _ in range(4)]
    for calibration in (None, samples):
        (result,) = compile(mod, "llvm", calibration=calibration).run(samples[0])
        exact = evaluate(mod, samples[0])[0]
        tolerance = 1e-5 if calibration is None else 0.05
        np.testing.assert_allclose(result, exact, rtol=0, atol=tolerance * np.abs(exact).max())
