"""Decibels that the outputs may lose buy layouts that multiply faster, the cheapest for each multiply-add first."""

from types import SimpleNamespace

import numpy as np
import pytest
from relax_programs import NHWC, build, constant, random
from tvm import relax
from tvm.relax import op as R

from tvm_qfp8.calibration import calibrate
from tvm_qfp8.calibration.choose_activation import LINEAR
from tvm_qfp8.calibration.linear import Linear
from tvm_qfp8.calibration.product_time import product_time
from tvm_qfp8.calibration.propagate import relative_energy
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
    return 1 if activation in LINEAR.activations else 2


def test_decibels_buy_cheaper_layouts():
    found = [layouts(loss) for loss in LOSSES]
    costs = [sum(cost(*layer) for layer in chosen) for chosen, _ in found]
    assert costs == sorted(costs, reverse=True) and costs[-1] == 3  # all in bytes
    assert [cost(*layer) for layer in found[0][0]][:2] == [2, 2]  # the tails keep three exponent bits
    assert len(set(costs)) == 3  # one by one
    for chosen, sqnr in found:
        assert all(weight == "E1M6" for layout, weight in chosen if layout in LINEAR.activations)
        assert np.isfinite(sqnr)


def dense(rows, depth):
    """Two dense layers whose activations have tails; of such depths as no rotation spreads."""

    def body(emit, x):
        y = emit(R.matmul(emit(R.multiply(x, emit(R.abs(x)))), constant(depth, depth, scale=0.1)))
        return emit(R.matmul(emit(R.multiply(y, emit(R.abs(y)))), constant(depth, 96, seed=1, scale=0.1)))

    return build({"x": ((rows, depth), "float32")}, body)


@pytest.mark.parametrize("rows, depth, in_bytes", [(32, 700, True), (1024, 36, False)])
def test_weights_are_bytes_where_decoding_others_takes_long(rows, depth, in_bytes, monkeypatch):
    for budget in ("BYTE_LOSS_DB", "BARGAIN_LOSS_DB"):
        monkeypatch.setattr(f"tvm_qfp8.calibration.grades.{budget}", 0.0)
    samples = [{"x": random(rows, depth, seed=i)} for i in range(4)]
    plans = [calibrate(dense(rows, depth), samples, Config(byte_loss_db=loss)) for loss in (0.0, None)]
    exact, chosen = ([(one.activation.layout, one.weight.layout) for one in p.linear.values()] for p in plans)
    assert [weight for _, weight in exact] == ["E2M5"] * 2
    assert all(activation not in LINEAR.activations for activation, _ in chosen)
    assert ("E1M6" in {weight for _, weight in chosen}) == in_bytes


def test_time_is_what_tiles_take():
    """In products of tiles, as ``topi.amx.plan`` counts them; sums of this depth are exact in one block or in three."""

    def linear(rows, depth, columns=64):
        weight = np.zeros((depth, columns), np.float32)
        step = SimpleNamespace(operator="relax.matmul", spec=SimpleNamespace(shape=(rows, columns)))
        return Linear(step, "x", weight, weight_axis=1, channel_axis=1)

    few, many = linear(32, 768), linear(4096, 64)
    assert product_time(few, "E1M6", "E1M6") == 4 * 2 * 12
    assert product_time(few, "E2M5", "E1M6") == 4 * 2 * (24 + 6)
    assert product_time(few, "E2M5", "E2M5") == pytest.approx(4 * (2 * (24 + 9) + 0.22 * 768))
    assert product_time(few, "E3M4", "E2M5") == pytest.approx(4 * (2 * (48 + 18) + 0.22 * 768))
    assert product_time(many, "E2M5", "E2M5") < product_time(many, "E2M5", "E1M6")


@pytest.mark.parametrize("loss", [0.3, 1.0, 3.0])
def test_no_more_is_lost_than_was_asked_for(loss):
    """The estimate adds up what each tensor does alone, so it is no bound; half again as much is far off."""
    assert layouts(0.0)[1] - layouts(loss)[1] < 1.5 * loss


def test_a_decibel_has_to_save_its_share_unless_it_was_asked_for():
    """A layer of few multiply-adds whose activation has a tail, beside one of many."""

    def body(emit, x):
        attrs = {"data_layout": "NHWC", "kernel_layout": "OHWI"}
        many = emit(R.nn.conv2d(emit(R.tanh(x)), constant(256, 1, 1, 32, scale=0.3), **attrs))
        tail = emit(R.multiply(x, emit(R.abs(x))))
        few = emit(R.nn.conv2d(tail, constant(4, 1, 1, 32, seed=1, scale=0.1), **attrs))
        return emit(R.concat([many, few], axis=3))

    mod = build({"x": ((1, 20, 20, 32), "float32")}, body)
    samples = [{"x": random(1, 20, 20, 32, seed=i)} for i in range(4)]
    in_bytes = {
        loss: [
            one.activation.layout in LINEAR.activations
            for one in calibrate(mod, samples, Config(byte_loss_db=loss)).linear.values()
        ]
        for loss in (None, 1.5)
    }
    assert in_bytes == {None: [True, False], 1.5: [True, True]}


@pytest.mark.parametrize("mean, in_bytes", [(0.0, True), (1000.0, False)])
def test_decibels_that_nobody_would_notice_are_spent(mean, in_bytes):
    """What errs is a hundredth of the outputs; a mean of theirs, as of temperatures in Kelvin, is no signal."""

    def body(emit, x):
        tail = emit(R.multiply(emit(R.multiply(x, x)), x))
        small = emit(R.nn.conv2d(tail, constant(8, 1, 1, 8, scale=0.001), **NHWC))
        shift = relax.const(np.float32(mean))
        return emit(R.add(emit(R.add(small, shift)), emit(R.multiply(x, relax.const(np.float32(mean == 0))))))

    mod = build({"x": ((1, 30, 30, 8), "float32")}, body)
    plan = calibrate(mod, [{"x": random(1, 30, 30, 8, seed=i)} for i in range(4)])
    (layer,) = plan.linear.values()
    assert (layer.activation.layout in LINEAR.activations) == in_bytes


@pytest.mark.parametrize("tails, linear", [(1, True), (3, False)])
def test_what_saves_much_may_cost_more(tails, linear, monkeypatch):
    """The longer an activation's tails are, the more does a linear layout cost."""
    monkeypatch.setattr("tvm_qfp8.calibration.grades.BYTE_LOSS_DB", 0.0)

    def body(emit, x):
        y = x
        for _ in range(tails):
            y = emit(R.multiply(y, emit(R.abs(x))))
        return emit(R.matmul(y, constant(36, 96, scale=0.1)))

    samples = [{"x": random(1024, 36, seed=i)} for i in range(4)]
    (layer,) = calibrate(build({"x": ((1024, 36), "float32")}, body), samples, Config()).linear.values()
    assert (layer.activation.layout in LINEAR.activations) == linear


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("rows", [1, 1000])
def test_many_rows_or_outputs_lose_no_more_than_one(rows, outputs):
    exact, change = np.full((1, rows, 8), 2.0), np.full((1, rows, 8), 0.1)
    assert relative_energy([change] * outputs, [exact] * outputs, None) == pytest.approx(0.05**2)
