"""Convolutions without calibration samples: a scale for each pixel or sample found at run time, or one known limit."""

from __future__ import annotations

import numpy as np
import pytest
from quantized_programs import RUNS, TARGETS
from relax_programs import NHWC, build, constant, random
from tvm.relax import op as R

import tvm_qfp8 as q
from tvm_qfp8.calibration import calibrate, evaluate_quantized
from tvm_qfp8.calibration.without_samples import FEW_MACS
from tvm_qfp8.config import Config
from tvm_qfp8.format import encode, get_layout
from tvm_qfp8.topi import reference
from tvm_qfp8.topi.conv2d import ConvShape

BEFORE = {R.negative: np.negative, R.abs: np.abs}


@pytest.mark.parametrize("isa", RUNS)
@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    "kernel, how, before, described",
    [
        ((48, 1, 1, 20), {}, R.negative, "E2M5 by row"),
        ((48, 1, 1, 20), {}, R.abs, "UE1M7 by row"),
        ((48, 1, 1, 20), {"padding": 1}, R.negative, "E2M5 by sample"),
        ((128, 1, 1, 20), {"strides": 2}, R.abs, "UE1M7 by row"),
        ((208, 1, 1, 20), {"strides": (2, 3)}, R.negative, "E2M5 by row"),
        ((40, 3, 3, 20), {"padding": 1}, R.negative, "E2M5 by sample"),  # by Winograd where that is faster
        ((40, 3, 3, 20), {"padding": 1}, R.abs, "UE2M6 by sample"),
        ((40, 3, 3, 10), {"padding": 1, "strides": (2, 1), "groups": 2}, R.negative, "E2M5 by sample"),
        ((20, 3, 3, 1), {"padding": 1, "groups": 20}, R.abs, "float32"),
        ((16, 1, 1, 20), {}, R.negative, "float32"),
        ((1, 3, 3, 20), {"padding": 1}, R.negative, "E2M5 by sample"),  # a vector of one output
    ],
)
def test_a_convolution_is_its_twin(isa, threads, kernel, how, before, described):
    x = random(3, 9, 8, 20)
    x[0] *= 1000  # samples of their own size
    weight, bias = constant(*kernel), constant(kernel[0], seed=1)

    def body(emit, x):
        return emit(R.add(emit(R.nn.conv2d(emit(before(x)), weight, **how, **NHWC)), bias))

    mod = build({"x": (x.shape, "float32")}, body)
    module = q.compile(mod, TARGETS[isa], config=Config(threads=threads))
    (layer,) = module.report.layers
    assert layer.activation_layout == described
    found = module.run({"x": x})[0]
    (chosen,) = calibrate(mod, None).linear.values()
    if chosen.activation is None:
        assert layer.became == "QFP8 weights" and layer.reason == FEW_MACS
        (expected,) = evaluate_quantized(mod, calibrate(mod, None), {"x": x})
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4 * np.abs(expected).max())
        return
    layouts = get_layout(chosen.activation.layout), get_layout(chosen.weight.layout)
    encode = reference.encode_rows if described.endswith("by row") else reference.encode_samples
    codes, scales = encode(BEFORE[before](x), layouts[0])
    total = reference.conv2d(codes, chosen.weight.codes, conv_shape_of(x.shape, kernel, how, layouts))
    rows, columns = np.broadcast_to(how.get("strides", 1), 2)
    scales = scales[:, ::rows, ::columns] if scales.ndim == 3 else scales[:, None, None]
    a = np.asarray(chosen.weight.scale).reshape(-1)
    np.testing.assert_array_equal(found, reference.scale_and_bias(total, a, bias.value.numpy(), scales))


def conv_shape_of(shape, kernel, how, layouts):
    pair = lambda value: value if isinstance(value, tuple) else (value, value)  # noqa: E731
    padding = (how.get("padding", 0),) * 4
    strides, groups = pair(how.get("strides", 1)), how.get("groups", 1)
    return ConvShape(*shape, kernel[0], kernel[1:3], strides, padding, (1, 1), groups, *layouts)


def test_a_transposed_convolution_has_a_scale_for_each_sample():
    x = random(2, 5, 4, 8)
    x[0] *= 1000

    def body(emit, x):
        call = R.nn.conv2d_transpose(
            emit(R.negative(x)),
            constant(24, 3, 3, 8),
            strides=(2, 2),
            data_layout="NHWC",
            kernel_layout="OHWI",
        )
        return emit(call)

    mod = build({"x": (x.shape, "float32")}, body)
    module = q.compile(mod)
    (layer,) = module.report.layers
    assert (layer.became, layer.activation_layout) == ("QFP8", "E2M5 by sample")
    (expected,) = evaluate_quantized(mod, calibrate(mod, None), {"x": x})
    for found, sample in zip(module.run({"x": x})[0], expected, strict=True):
        np.testing.assert_allclose(found, sample, atol=1e-4 * np.abs(sample).max())


@pytest.mark.parametrize("isa", RUNS)
@pytest.mark.parametrize(
    "kernel, how", [((48, 1, 1, 20), {}), ((20, 3, 3, 1), {"padding": 1, "groups": 20}), ((16, 1, 1, 20), {})]
)
def test_values_with_a_limit_have_one_scale(isa, kernel, how):
    x = random(3, 9, 8, 20) * 4
    weight = constant(*kernel)

    def body(emit, x):
        return emit(R.nn.conv2d(emit(R.clip(x, 0, 6)), weight, **how, **NHWC))

    mod = build({"x": (x.shape, "float32")}, body)
    module = q.compile(mod, TARGETS[isa])
    (layer,) = module.report.layers
    assert (layer.became, layer.activation_layout) == ("QFP8", "UE2M6")
    (chosen,) = calibrate(mod, None).linear.values()
    layouts = get_layout("UE2M6"), get_layout(chosen.weight.layout)
    scale = np.float32(6 / layouts[0].max_grid)
    assert chosen.activation.scale == scale
    codes = encode(np.clip(x, 0, 6), scale, layouts[0])
    total = reference.conv2d(codes, chosen.weight.codes, conv_shape_of(x.shape, kernel, how, layouts))
    a = np.asarray(chosen.weight.scale).reshape(-1) * scale
    np.testing.assert_array_equal(
        module.run({"x": x})[0], reference.scale_and_bias(total, a, np.zeros_like(a))
    )
