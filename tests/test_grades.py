"""Decibels that the outputs may lose buy layouts that multiply faster, the cheapest for each multiply-add first."""

import numpy as np
import pytest
from relax_programs import build, constant, random
from tvm.relax import op as R

from tvm_qfp8.calibration import calibrate
from tvm_qfp8.calibration.choose_activation import LINEAR, NARROW
from tvm_qfp8.config import Config

LOSSES = [0.0, 0.3, 1.0, 3.0, 10.0, 60.0]


def network():
    """Three convolutions whose inputs have tails of their own: a cube's, a square's, and none."""

    def convolution(emit, x, seed):
        weight = constant(8, 1, 1, 8, seed=seed, scale=0.3)
        return emit(R.nn.conv2d(x, weight, data_layout="NHWC", kernel_layout="OHWI"))

    def body(emit, x):
        cube = convolution(emit, emit(R.multiply(emit(R.multiply(x, x)), x)), 1)
        square = convolution(emit, emit(R.multiply(cube, emit(R.abs(cube)))), 2)
        return convolution(emit, emit(R.tanh(square)), 3)

    return build({"x": ((1, 30, 30, 8), "float32")}, body)


def layouts(loss):
    plan = calibrate(
        network(), [{"x": random(1, 30, 30, 8, seed=i)} for i in range(4)], Config(byte_loss_db=loss)
    )
    chosen = [(one.activation.layout, one.weight.layout) for one in plan.linear.values()]
    sqnr = [one.sqnr_db for one in plan.linear.values()][-1]
    return chosen, sqnr


def cost(activation, _weight):
    return 1 if activation in LINEAR.activations else 2 if activation in NARROW.activations else 3


def test_decibels_buy_cheaper_layouts():
    found = [layouts(loss) for loss in LOSSES]
    costs = [sum(cost(*layer) for layer in chosen) for chosen, _ in found]
    assert costs == sorted(costs, reverse=True) and costs[-1] == 3  # all in bytes
    assert [cost(*layer) for layer in found[0][0]][:2] == [3, 3]  # the tails keep three exponent bits
    assert any(cost(*layer) == 2 for chosen, _ in found[1:-1] for layer in chosen)
    for chosen, sqnr in found:
        assert all(weight == "E1M6" for layout, weight in chosen if layout in LINEAR.activations)
        assert np.isfinite(sqnr)


@pytest.mark.parametrize("loss", [0.3, 1.0, 3.0])
def test_no_more_is_lost_than_was_asked_for(loss):
    """The estimate adds up what each tensor does alone, so it is no bound; half again as much is far off."""
    assert layouts(0.0)[1] - layouts(loss)[1] < 1.5 * loss
