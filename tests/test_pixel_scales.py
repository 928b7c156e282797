"""Pixels that 1x1 convolutions read get scales of their own for linear layouts, where that saves more than it takes."""

from __future__ import annotations

import numpy as np
import pytest
from quantized_programs import RUNS, TARGETS
from relax_programs import NHWC, build, constant, random
from tvm.relax import op as R

import tvm_qfp8 as q
from tvm_qfp8.calibration import calibrate, evaluate_quantized
from tvm_qfp8.calibration.choose_activation import LINEAR
from tvm_qfp8.config import Config

CHANNELS, OUTPUTS = 64, 128


def network(outputs=OUTPUTS, strides=1, window=1):
    """A convolution that reads the opposite of the input, and a 1x1 one that does, too, if its window is another."""

    def body(emit, x):
        x = emit(R.negative(x))
        weight = constant(outputs, window, window, CHANNELS, scale=0.1)
        found = emit(R.nn.conv2d(x, weight, **NHWC, strides=(strides, strides)))
        if window == 1:
            return found
        other = emit(R.nn.conv2d(x, constant(outputs, 1, 1, CHANNELS, seed=1, scale=0.1), **NHWC))
        return emit(R.concat([emit(R.mean(found, axis=[1, 2])), emit(R.mean(other, axis=[1, 2]))], axis=1))

    return build({"x": ((1, 6, 7, CHANNELS), "float32")}, body)


def images(count):
    """A few pixels are far larger than the rest, each in channels of its own."""
    samples = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((1, 6, 7, CHANNELS)).astype(np.float32)
        for row in rng.choice(42, 4, replace=False):
            pixel = x.reshape(42, CHANNELS)[row]
            pixel[rng.choice(CHANNELS, 3, replace=False)] *= 200
        samples.append({"x": x})
    return samples


def chosen(mod, loss=3.0):
    (one, *_) = calibrate(mod, images(6), Config(byte_loss_db=loss)).linear.values()
    return one


@pytest.mark.parametrize("isa", RUNS)
@pytest.mark.parametrize("strides", [1, 2])
def test_a_module_computes_what_calibration_saw(isa, strides):
    mod, samples = network(512, strides), images(6)
    config = Config(byte_loss_db=3.0)
    module = q.compile(mod, TARGETS[isa], calibration=samples, config=config)
    (layer,) = module.report.layers
    assert layer.activation_layout == "E1M6 by row, rotated" and layer.weight_layout == "E1M6"
    (expected,) = evaluate_quantized(mod, calibrate(mod, samples, config), samples[0])
    (found,) = module.run(samples[0])
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_the_small_pixels_keep_what_one_scale_would_lose():
    """Of most pixels the largest value is a hundredth of the largest of all."""
    mod, samples = network(), images(6)
    by_pixel, linear = (
        evaluate_quantized(mod, calibrate(mod, samples, Config(byte_loss_db=loss)), samples[0])[0]
        for loss in (3.0, 200.0)
    )
    (exact,) = q.compile(mod, config=Config(activations="float32", skip=("*",))).run(samples[0])
    small = np.abs(samples[0]["x"]).max(axis=-1) < 10
    off, off_linear = (float(np.square(one - exact)[small].sum()) for one in (by_pixel, linear))
    assert 100 * off < off_linear


@pytest.mark.parametrize("outputs, by_rows", [(OUTPUTS, True), (16, False)])
def test_few_outputs_do_not_pay_for_the_pass(outputs, by_rows):
    activation = chosen(network(outputs)).activation
    assert activation.by_rows == by_rows and (activation.layout in LINEAR.activations) == by_rows


def test_what_other_windows_read_has_one_scale():
    assert chosen(network(window=3)).activation.has_one_scale


def test_no_loss_buys_no_pass():
    activation = chosen(network(), loss=0.0).activation
    assert activation.has_one_scale and activation.layout not in LINEAR.activations


def test_pixels_that_are_alike_have_one_scale():
    samples = [{"x": np.sign(random(1, 6, 7, CHANNELS, seed=seed))} for seed in range(4)]
    (one,) = calibrate(network(), samples, Config(byte_loss_db=3.0)).linear.values()
    assert one.activation.has_one_scale and one.activation.layout in LINEAR.activations
