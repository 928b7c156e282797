"""The number formats: every code, every midpoint, every float16 value, specials, and properties."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tvm_qfp8.errors import InputError
from tvm_qfp8.format import LAYOUTS, decode, decode_grid, encode, get_layout

ALL_CODES = np.arange(256, dtype=np.uint8)
ALL_FLOAT16 = np.arange(1 << 16, dtype=np.uint16).view(np.float16)

every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
signed_layouts = pytest.mark.parametrize(
    "layout", [x for x in LAYOUTS.values() if x.signed], ids=lambda x: x.name
)
unsigned_layouts = pytest.mark.parametrize(
    "layout", [x for x in LAYOUTS.values() if not x.signed], ids=lambda x: x.name
)


def positive_codes(layout):
    """Codes of the numbers >= 0; they rise with the numbers."""
    return np.arange(128 if layout.signed else 256)


def reference_encode(v, layout):
    """Nearest code by exact comparison with the midpoints, ties to the even code; ``v`` float32 without NaN."""
    grid = layout.grid[positive_codes(layout)].astype(np.float64)
    middles = (grid[1:] + grid[:-1]) / 2
    magnitude = np.abs(v.astype(np.float64)) if layout.signed else np.maximum(v.astype(np.float64), 0)
    below = np.searchsorted(middles, magnitude, side="left")
    above = np.searchsorted(middles, magnitude, side="right")
    code = np.where(below % 2 == 0, below, above)
    negative = layout.signed & (v < 0) & (code > 0)
    return (code + 0x80 * negative).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "largest"),
    [
        ("E1M6", 127),
        ("E2M5", 252),
        ("E3M4", 1984),
        ("E4M3", 245760),
        ("UE1M7", 255),
        ("UE2M6", 508),
        ("UE3M5", 4032),
    ],
)
def test_largest_grid_value(name, largest):
    layout = get_layout(name)
    assert layout.max_grid == largest == layout.grid.max()
    assert layout.exponent_bits + layout.mantissa_bits + layout.signed == 8
    assert layout.ir_dtype == f"custom[qfp8_{name.lower()}]8"


@every_layout
def test_grid_follows_definition(layout):
    for code in range(256):
        sign = -1 if layout.signed and code & 0x80 else 1
        exponent = (code & (0x7F if layout.signed else 0xFF)) >> layout.mantissa_bits
        mantissa = code & ((1 << layout.mantissa_bits) - 1)
        value = mantissa if exponent == 0 else ((1 << layout.mantissa_bits) + mantissa) * 2 ** (exponent - 1)
        assert layout.grid[code] == sign * value


@every_layout
@pytest.mark.parametrize("scale", [1.0, 2.0**-7, 0.0123, 3e-30, 1e30])
def test_every_code_round_trips(layout, scale):
    numbers = decode(ALL_CODES, scale, layout)
    assert numbers.dtype == np.float32
    assert np.array_equal(encode(numbers, scale, layout), ALL_CODES)


@every_layout
def test_decode_grid(layout):
    grid = decode_grid(ALL_CODES, layout)
    assert grid.dtype == np.int32
    numbers = decode(ALL_CODES, 1.0, layout)
    assert np.flatnonzero(np.isnan(numbers)).tolist() == [layout.nan_code] * layout.signed
    assert np.array_equal(grid, np.nan_to_num(numbers))


@every_layout
def test_midpoints_go_to_the_even_code(layout):
    codes = positive_codes(layout)
    grid = layout.grid[codes].astype(np.float32)
    middles = (grid[1:] + grid[:-1]) / 2
    lower, upper = codes[:-1], codes[1:]
    assert np.array_equal(encode(middles, layout=layout), np.where(lower % 2 == 0, lower, upper))
    assert np.array_equal(encode(np.nextafter(middles, np.float32(0)), layout=layout), lower)
    assert np.array_equal(encode(np.nextafter(middles, np.float32(np.inf)), layout=layout), upper)
    if layout.signed:
        even = np.where(lower % 2 == 0, lower, upper)
        assert np.array_equal(encode(-middles, layout=layout), np.where(even == 0, 0, even | 0x80))


@every_layout
def test_every_float16_value(layout):
    values = ALL_FLOAT16[~np.isnan(ALL_FLOAT16)]
    expected = reference_encode(values.astype(np.float32), layout)
    assert np.array_equal(encode(values, layout=layout), expected)
    assert np.array_equal(encode(values.astype(np.float64), layout=layout), expected)


@every_layout
def test_random_float32_bits(layout):
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[~np.isnan(values)]
    assert np.array_equal(encode(values, layout=layout), reference_encode(values, layout))


@every_layout
def test_values_are_multiplied_by_the_rounded_reciprocal(layout):
    rng = np.random.default_rng(1)
    values = (rng.standard_normal(100_000) * layout.max_grid / 100).astype(np.float32)
    scale = np.float32(0.0137)
    scaled = values * (np.float32(1) / scale)
    assert np.array_equal(encode(values, scale, layout), reference_encode(scaled, layout))


@every_layout
def test_zeros_and_infinities(layout):
    top = 0x7F if layout.signed else 0xFF
    tiny = np.float32(1e-45)
    values = np.float32([0.0, -0.0, tiny, -tiny, -0.5, 0.5, np.inf, 1e38])
    assert encode(values, layout=layout).tolist() == [0, 0, 0, 0, 0, 0, top, top]
    assert encode(np.float32(-np.inf), layout=layout) == (0xFF if layout.signed else 0x00)


@signed_layouts
def test_nan_is_code_0x80(layout):
    assert encode([1.0, np.nan, -np.nan], layout=layout).tolist()[1:] == [0x80, 0x80]
    assert np.isnan(decode(np.uint8([0x80]), 2.0, layout)).all()


@unsigned_layouts
def test_nan_is_refused_without_a_code(layout):
    with pytest.raises(InputError, match="NaN has no code"):
        encode([1.0, np.nan], layout=layout)


def test_one_zero():
    for layout in LAYOUTS.values():
        assert np.count_nonzero(decode(ALL_CODES, 1.0, layout) == 0) == 1


def test_e4m3_is_float8_e4m3fnuz():
    scale = 2.0**-10
    theirs = ALL_CODES.view(ml_dtypes.float8_e4m3fnuz).astype(np.float32)
    assert np.array_equal(decode(ALL_CODES, scale, "E4M3"), theirs, equal_nan=True)
    # They overflow to NaN where we clamp, so compare up to their largest number.
    values = ALL_FLOAT16[np.abs(ALL_FLOAT16) <= 240]
    assert np.array_equal(
        encode(values, scale, "E4M3"), values.astype(ml_dtypes.float8_e4m3fnuz).view(np.uint8)
    )


def test_e3m4_is_float8_e3m4_below_its_infinity():
    scale = 2.0**-6
    codes = ALL_CODES[(ALL_CODES & 0x7F) < 0x70]
    codes = codes[codes != 0x80]
    theirs = codes.view(ml_dtypes.float8_e3m4).astype(np.float32)
    assert np.array_equal(decode(codes, scale, "E3M4"), theirs)
    values = ALL_FLOAT16[np.abs(ALL_FLOAT16) <= 15.5]
    rounded = values.astype(ml_dtypes.float8_e3m4).view(np.uint8)
    assert np.array_equal(encode(values, scale, "E3M4"), np.where(rounded == 0x80, 0, rounded))


def test_e2m5_holds_float6_e2m3fn():
    codes = np.arange(32, dtype=np.uint8)
    theirs = codes.view(ml_dtypes.float6_e2m3fn).astype(np.float32)
    assert np.array_equal(decode(codes << 2, 2.0**-5, "E2M5"), theirs)


def test_linear_layouts_are_integers():
    assert np.array_equal(decode_grid(ALL_CODES[:128], "E1M6"), np.arange(128))
    assert np.array_equal(decode_grid(ALL_CODES, "UE1M7"), np.arange(256))


def test_scale_per_channel():
    rng = np.random.default_rng(2)
    values = rng.standard_normal((3, 5, 7)).astype(np.float32) * 100
    for axis in (0, 1, 2, -1):
        scales = rng.uniform(0.5, 2, values.shape[axis]).astype(np.float32)
        codes = encode(values, scales, "E2M5", axis)
        numbers = decode(codes, scales, "E2M5", axis)
        for channel, scale in enumerate(scales):
            part = np.take(codes, channel, axis)
            assert np.array_equal(part, encode(np.take(values, channel, axis), scale))
            assert np.array_equal(np.take(numbers, channel, axis), decode(part, scale))


def test_strided_empty_and_scalar_input():
    values = np.random.default_rng(3).standard_normal((40, 60)).astype(np.float32) * 90
    expected = encode(values)
    assert np.array_equal(encode(values.T), expected.T)
    assert encode(values.T).flags.c_contiguous
    assert np.array_equal(encode(values[::-3, 1::7]), expected[::-3, 1::7])
    assert encode(np.zeros((0, 4), np.float32)).shape == (0, 4)
    assert encode(np.zeros((0, 4), np.float32), np.ones(4), axis=1).shape == (0, 4)
    assert encode(3.0).shape == () and encode(3.0) == 3
    assert decode(np.uint8(3), 0.5) == 1.5
    assert encode([1, 2, 300]).tolist() == [1, 2, 0x7F]
    assert encode(values.astype(">f4")).tolist() == expected.tolist()


def test_input_is_not_written():
    values = np.linspace(-300, 300, 50, dtype=np.float32)
    before = values.copy()
    encode(values)
    encode(values, layout="UE2M6")
    assert np.array_equal(values, before)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, -np.inf, 1e-45, 2.0**-128])
def test_unusable_scale_is_refused(scale):
    for function, data in ((encode, [1.0]), (decode, np.uint8([1]))):
        with pytest.raises(InputError, match="scale .* cannot be used"):
            function(data, scale)


def test_smallest_usable_scale():
    assert encode(np.float32(2.0**-127), 2.0**-127) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=[1.0], layout="E5M2"), "layout 'E5M2' is not known; use one of E1M6"),
        (dict(x=[1j]), "not real"),
        (dict(x=["a"]), "not numbers"),
        (dict(x=[1.0, 2.0], scale=[1.0, 2.0]), "no axis"),
        (dict(x=[1.0, 2.0], scale=[1.0, 2.0], axis=1), "axis 1 does not exist"),
        (dict(x=[1.0, 2.0], scale=[1.0, 2.0, 3.0], axis=0), "one per channel"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        encode(**arguments)


def test_codes_must_be_uint8():
    with pytest.raises(InputError, match="uint8"):
        decode(np.int8([1]))


layouts = st.sampled_from(list(LAYOUTS.values()))
floats = hnp.arrays(
    np.float32, hnp.array_shapes(max_dims=3, max_side=6), elements=st.floats(width=32, allow_nan=False)
)


@given(layouts, floats)
def test_property_nearest(layout, values):
    codes = encode(values, layout=layout)
    clamped = np.clip(values.astype(np.float64), -layout.max_grid if layout.signed else 0, layout.max_grid)
    distance = np.abs(layout.grid - clamped[..., None]).min(axis=-1)
    assert np.array_equal(np.abs(decode_grid(codes, layout) - clamped), distance)


@given(layouts, floats)
def test_property_idempotent(layout, values):
    once = encode(values, layout=layout)
    assert np.array_equal(encode(decode(once, 1.0, layout), layout=layout), once)


@given(layouts, floats)
def test_property_monotone(layout, values):
    ordered = np.sort(values, axis=None)
    assert (np.diff(decode_grid(encode(ordered, layout=layout), layout)) >= 0).all()


@given(layouts.filter(lambda x: x.signed), floats)
def test_property_odd(layout, values):
    assert np.array_equal(
        decode_grid(encode(-values, layout=layout), layout),
        -decode_grid(encode(values, layout=layout), layout),
    )


@given(layouts, st.integers(-20, 20), hnp.arrays(np.float32, 8, elements=st.floats(-1000, 1000, width=16)))
def test_property_power_of_two_scale_is_exact(layout, exponent, values):
    scale = 2.0**exponent
    assert np.array_equal(encode(values * np.float32(scale), scale, layout), encode(values, layout=layout))
