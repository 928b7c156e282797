"""PReLU of channels that come last is part of the kernel before it."""

import numpy as np
import pytest
from relax_programs import build, constant, random
from tvm.relax import op as R

import tvm_qfp8 as q
from tvm_qfp8.calibration import evaluate
from tvm_qfp8.relay_passes.fuse import Group, partition


@pytest.mark.parametrize(("axis", "members"), [(2, 2), (-1, 2), (1, 1)])
def test_prelu_in_the_kernel_before_it(axis, members):
    shape = (2, 12, 12)
    slopes = constant(12)
    mod = build(
        {"x": (shape, "float32")}, lambda e, x: e(R.nn.prelu(e(R.add(x, constant(12, seed=1))), slopes, axis))
    )
    group = partition(mod["main"].body.blocks[0], set())[0]
    assert isinstance(group, Group) and len(group.members) == members
    x = random(*shape)
    np.testing.assert_array_equal(q.compile(mod)(x)[0], evaluate(mod, {"x": x})[0])
