"""Rows and columns of a window that only meet padding are taken off."""

import numpy as np
import pytest
from relax_programs import build, constant, random
from tvm.relax import op as R

from tvm_qfp8.calibration import evaluate
from tvm_qfp8.relay_passes.drop_taps import DropTaps
from tvm_qfp8.relay_passes.fuse import op_name


def convolution(side, kernel, stride, padding, dilation, groups=1):
    def body(emit, x):
        weight = constant(6, *kernel, 4 // groups, seed=1)
        return emit(
            R.nn.conv2d(
                x,
                weight,
                strides=stride,
                padding=padding,
                dilation=dilation,
                groups=groups,
                data_layout="NHWC",
                kernel_layout="OHWI",
            )
        )

    return build({"x": ((2, *side, 4), "float32")}, body)


def window(mod):
    (call,) = (b.value for b in mod["main"].body.blocks[0].bindings if op_name(b.value) == "relax.nn.conv2d")
    return [int(extent) for extent in call.args[1].ty.shape][1:3]


@pytest.mark.parametrize(
    "side, kernel, stride, padding, dilation, groups, left",
    [
        ((8, 8), (3, 3), (1, 1), (12, 12, 12, 12), (12, 12), 1, [1, 1]),
        ((8, 8), (3, 3), (1, 1), (12, 12, 12, 12), (12, 12), 2, [1, 1]),
        ((8, 20), (3, 3), (1, 1), (12, 12, 12, 12), (12, 12), 1, [1, 3]),
        ((8, 8), (5, 5), (1, 1), (8, 8, 8, 8), (4, 4), 1, [3, 3]),
        ((1, 9), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, [1, 3]),
        ((1, 1), (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1, [1, 1]),
        ((8, 8), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, [3, 3]),
        ((4, 4), (3, 3), (1, 1), (0, 0, 9, 9), (1, 1), 1, [3, 3]),
        ((2, 9), (3, 3), (1, 1), (0, 1, 4, 1), (2, 1), 1, [1, 3]),
        ((4, 4), (2, 2), (1, 1), (9, 9, 0, 0), (9, 9), 1, [1, 1]),
        ((4, 4), (1, 1), (1, 1), (7, 7, 7, 7), (1, 1), 1, [1, 1]),
    ],
)
def test_the_result_stays(side, kernel, stride, padding, dilation, groups, left):
    mod = convolution(side, kernel, stride, padding, dilation, groups)
    fewer = DropTaps()(mod)
    assert window(fewer) == left
    x = {"x": random(2, *side, 4)}
    np.testing.assert_allclose(evaluate(fewer, x)[0], evaluate(mod, x)[0], rtol=1e-5, atol=1e-5)
