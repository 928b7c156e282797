"""Choice of the dynamic bias: the search finds what an exhaustive one finds, per tensor and per channel."""

import time
from statistics import NormalDist

import numpy as np
import pytest

from tvm_qfp8.bias_search import direct_error
from tvm_qfp8.errors import InputError
from tvm_qfp8.format import LAYOUTS, decode, encode
from tvm_qfp8.quantize import QTensor, quantize, select_activation

every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def squared_error(x, scale, layout):
    numbers = decode(encode(x, scale, layout), scale, layout)
    return float(np.sum((numbers.astype(np.float64) - x) ** 2))


def sqnr(x, quantized):
    error = np.sum((quantized.dequantize().astype(np.float64) - x) ** 2)
    return 10 * np.log10(np.sum(x.astype(np.float64) ** 2) / error)


def step_scales(x, layout):
    """The 57 scales of the search, largest first."""
    largest = np.abs(x).max() if LAYOUTS[layout].signed else x.max()
    s_max = np.float64(np.float32(largest) / np.float32(LAYOUTS[layout].max_grid))
    return (s_max * np.exp2(-np.arange(-16, 41) / 16)).astype(np.float32)


@every_layout
def test_mse_is_no_worse_than_any_step(layout):
    x = np.random.default_rng(0).standard_normal(2000).astype(np.float32)
    found = quantize(x, layout=layout)
    best = min(squared_error(x, scale, layout) for scale in step_scales(x, layout))
    assert squared_error(x, found.scale, layout) <= best * (1 + 1e-12)
    assert np.array_equal(found.codes, encode(x, found.scale, layout))


@every_layout
def test_error_of_a_scale_is_that_of_its_codes(layout):
    """Also of channels that are no whole number of vectors long, and where the largest values are clipped."""
    x = np.abs(np.random.default_rng(8).standard_normal((3, 37))).astype(np.float32)
    scales = (x.max(1) / LAYOUTS[layout].max_grid * np.array([0.7, 1, 1.3])).astype(np.float32)
    expected = [squared_error(row, scale, layout) for row, scale in zip(x, scales, strict=True)]
    np.testing.assert_allclose(direct_error(x, LAYOUTS[layout])(scales), expected, rtol=1e-4)


def test_mse_reaches_a_fine_search():
    x = np.random.default_rng(1).standard_normal(3000).astype(np.float32)
    scales = step_scales(x, "E2M5")
    fine = np.geomspace(scales[0], scales[-1], 4000).astype(np.float32)
    best = min(squared_error(x, scale, "E2M5") for scale in fine)
    # The golden section ends in one valley of a slightly rugged function: within the bracket it searched.
    assert squared_error(x, quantize(x).scale, "E2M5") <= 1.02 * best


def test_gaussian_sqnr_is_that_of_the_format():
    """At the quantiles of a Gaussian, so that no random tail moves the result."""
    x = np.float32([NormalDist().inv_cdf((i + 0.5) / 400_000) for i in range(400_000)])
    for layout, expected in (("E2M5", 42.7), ("E3M4", 37.6), ("E4M3", 31.6), ("E1M6", 40.5)):
        assert sqnr(x, quantize(x, layout=layout)) == pytest.approx(expected, abs=0.1)


def test_channels_are_independent():
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((6, 50, 4)) * np.exp(rng.standard_normal((6, 1, 1)) * 3)).astype(np.float32)
    together = quantize(x, axis=0)
    assert together.scale.shape == (6,) and together.scale.dtype == np.float32 and together.axis == 0
    for channel in range(6):
        alone = quantize(x[channel])
        assert alone.scale == together.scale[channel]
        assert np.array_equal(alone.codes, together.codes[channel])
    for axis in (1, 2, -1):
        moved = quantize(np.moveaxis(x, 0, axis), axis=axis)
        assert moved.axis == axis % 3
        assert np.array_equal(moved.scale, together.scale)
        assert np.array_equal(np.moveaxis(moved.codes, axis, 0), together.codes)


def test_long_and_short_channels_take_the_same_scales():
    """Blocks of the search hold many short channels or a part of a long one."""
    x = np.random.default_rng(4).standard_normal((2, 40_000)).astype(np.float32)
    together = quantize(x, axis=0)
    best = [min(squared_error(row, s, "E2M5") for s in step_scales(row, "E2M5")) for row in x]
    for row, scale, error in zip(x, together.scale, best, strict=True):
        assert squared_error(row, scale, "E2M5") <= error * (1 + 1e-12)


@pytest.mark.parametrize("bias", ["mse", "max", "integer"])
def test_zero_channel_gets_scale_one(bias):
    x = np.zeros((3, 8), np.float32)
    x[1] = np.linspace(-1, 1, 8)
    found = quantize(x, axis=0, bias=bias)
    assert found.scale[0] == found.scale[2] == 1
    assert not found.codes[[0, 2]].any()
    assert quantize(np.zeros((0, 4), np.float32), axis=1, bias=bias).scale.tolist() == [1, 1, 1, 1]
    assert quantize(np.float32([-3, -1]), layout="UE2M6", bias=bias).scale == 1


@every_layout
def test_exact_data_cost_nothing(layout):
    """Grid values times 2^-5 are exact at the scale 2^-5, which is step k = 0."""
    numbers = decode(np.arange(1, 128 if LAYOUTS[layout].signed else 256, dtype=np.uint8), 2.0**-5, layout)
    found = quantize(numbers, layout=layout)
    assert found.scale == 2.0**-5
    assert np.array_equal(found.dequantize(), numbers)


@every_layout
def test_of_equally_good_scales_the_largest_wins(layout):
    """The largest grid value G is exact at scale 1 (k = 0) and, where G / 2 is on the grid, at 2 (k = -16) as well."""
    largest = LAYOUTS[layout].max_grid
    found = quantize(np.float32([largest, 0]), layout=layout)
    assert found.scale == (1 if largest % 2 else 2)


def test_max_puts_the_largest_value_on_the_largest_grid_value():
    x = np.random.default_rng(5).standard_normal(500).astype(np.float32)
    found = quantize(x, bias="max")
    assert found.scale == np.abs(x).max() / np.float32(252)
    assert found.codes[np.abs(x).argmax()] & 0x7F == 0x7F


def test_integer_bias_is_the_best_power_of_two():
    x = np.random.default_rng(6).standard_normal((20, 300)).astype(np.float32)
    found = quantize(x, axis=0, bias="integer")
    mantissa, _ = np.frexp(found.scale)
    assert (mantissa == 0.5).all()
    for row, scale in zip(x, found.scale, strict=True):
        errors = [squared_error(row, np.float32(2.0**-b), "E2M5") for b in range(-5, 20)]
        assert squared_error(row, scale, "E2M5") == pytest.approx(min(errors), rel=1e-12)


@pytest.mark.parametrize("bias", ["mse", "max", "integer"])
@pytest.mark.parametrize("largest", [1e-45, 1e-37, 3e38])
def test_extreme_magnitudes_give_usable_scales(bias, largest):
    x = np.linspace(-1, 1, 64).astype(np.float32) * np.float32(largest)
    found = quantize(x, bias=bias)
    assert np.isfinite(1 / found.scale)
    assert np.isfinite(found.dequantize()).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_with_their_index(bad):
    x = np.ones((3, 4), np.float32)
    x[1, 2] = bad
    with pytest.raises(InputError, match=r"index \(1, 2\)"):
        quantize(x, axis=0)
    with pytest.raises(InputError, match="finite"):
        select_activation(x)


def test_wrong_arguments():
    x = np.ones((3, 4), np.float32)
    with pytest.raises(InputError, match="axis 2 does not exist"):
        quantize(x, axis=2)
    with pytest.raises(InputError, match="bias 'kl' is not known"):
        quantize(x, bias="kl")
    with pytest.raises(InputError, match="at least one"):
        select_activation(x, ())


def test_qtensor_of_transposed_input():
    x = np.random.default_rng(7).standard_normal((12, 30)).astype(np.float32)
    found, transposed = quantize(x, axis=1), quantize(x.T, axis=0)
    assert isinstance(found, QTensor) and found.layout == "E2M5"
    assert np.array_equal(found.codes.T, transposed.codes)
    assert np.array_equal(found.dequantize(), decode(found.codes, found.scale, "E2M5", 1))


def test_activation_layouts_fit_their_distributions():
    rng = np.random.default_rng(8)
    gaussian = rng.standard_normal(20_000).astype(np.float32)
    outliers = rng.standard_t(3, 20_000).astype(np.float32)
    layouts = ("E2M5", "E3M4", "UE2M6", "UE3M5")
    assert select_activation(gaussian, layouts)[0] == "E2M5"
    assert select_activation(outliers, layouts)[0] == "E3M4"
    assert select_activation(np.maximum(gaussian, 0), layouts)[0] == "UE2M6"
    assert select_activation(np.maximum(outliers, 0), layouts)[0] == "UE3M5"
    assert select_activation(np.zeros(10), layouts) == ("E2M5", 1.0)


@every_layout
def test_activation_scale_is_that_of_quantize(layout):
    """Both searches see the same errors up to float32 rounding of single values."""
    x = np.random.default_rng(9).standard_normal(5000).astype(np.float32) + np.float32(0.5)
    name, scale = select_activation(x, (layout,))
    assert name == layout
    assert squared_error(x, scale, layout) == pytest.approx(
        squared_error(x, quantize(x, layout=layout).scale, layout), rel=1e-3
    )


def test_activation_search_is_fast():
    x = np.random.default_rng(10).standard_normal(1 << 16).astype(np.float32)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        select_activation(x)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1


@pytest.mark.slow
def test_ten_million_weights_take_seconds():
    x = np.random.default_rng(11).standard_normal((2560, 4096)).astype(np.float32)
    start = time.perf_counter()
    quantize(x, axis=0)
    assert time.perf_counter() - start < 15
