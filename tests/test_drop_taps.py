"""Rows and columns of a window that only meet padding are taken off."""

import numpy as np
import pytest
from relax_programs import build, constant, random
from tvm import relax
from tvm.relax import op as R

from tvm_qfp8.calibration import evaluate
from tvm_qfp8.relay_passes.drop_taps import DropTaps
from tvm_qfp8.relay_passes.fuse import op_name


def convolution(side, kernel, stride, padding, dilation, groups=1, zeros=(), outputs=6):
    def body(emit, x):
        weight = constant(outputs, *kernel, 4 // groups, seed=1)
        if zeros:
            array = weight.value.numpy().copy()
            for rows_and_columns in zeros:
                array[(slice(None), *rows_and_columns)] = 0
            weight = relax.const(array)
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


ALL = slice(None)


@pytest.mark.parametrize(
    "side, kernel, stride, padding, zeros, outputs, left",
    [
        ((9, 9), (5, 5), (1, 1), (2, 2, 2, 2), [(slice(0, 1),), (ALL, slice(3, 5))], 6, [4, 3]),
        ((1, 40), (1, 16), (1, 3), (0, 0, 0, 0), [(ALL, slice(0, 4)), (ALL, slice(13, 16))], 200, [1, 9]),
        ((1, 40), (1, 16), (1, 3), (0, 2, 0, 1), [(ALL, slice(0, 4)), (ALL, slice(13, 16))], 200, [1, 9]),
        ((1, 40), (1, 16), (1, 3), (0, 0, 0, 0), [(ALL, slice(0, 4))], 2, [1, 16]),  # a copy costs more
        ((9, 9), (3, 3), (1, 1), (1, 1, 1, 1), [(slice(1, 2),)], 6, [3, 3]),  # zeros inside
        ((9, 9), (3, 3), (1, 1), (1, 1, 1, 1), [(ALL,)], 6, [3, 3]),  # nothing but zeros
    ],
)
def test_zeros_at_the_ends_of_a_window_are_taken_off(side, kernel, stride, padding, zeros, outputs, left):
    mod = convolution(side, kernel, stride, padding, (1, 1), zeros=zeros, outputs=outputs)
    fewer = DropTaps()(mod)
    assert window(fewer) == left
    x = {"x": random(2, *side, 4)}
    np.testing.assert_allclose(evaluate(fewer, x)[0], evaluate(mod, x)[0], rtol=1e-5, atol=1e-5)
