"""Linear resizing against its NumPy twin, bit for bit, and against torch."""

import numpy as np
import pytest
from quantized_programs import TARGETS, build, machine_runs, program, run
from relax_programs import build as relax_build
from relax_programs import random
from tvm import relax

from tvm_qfp8.relay_passes.fuse import op_name
from tvm_qfp8.relay_passes.prepare import prepare
from tvm_qfp8.topi import reference
from tvm_qfp8.topi.resize import COORDINATES, ResizeShape, linear_taps

SIZES = [((4, 5), (9, 16)), ((7, 3), (3, 8)), ((5, 5), (5, 5)), ((1, 6), (4, 1)), ((20, 30), (7, 45))]


def resized(x, size, layout, coordinates):
    return relax.op.image.resize2d(
        x, size, layout=layout, method="linear", coordinate_transformation_mode=coordinates
    )


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("size, out", SIZES)
@pytest.mark.parametrize("layout, channels", [("NHWC", 21), ("NHWC", 3), ("NCHW", 5)])
@pytest.mark.parametrize("target", [*TARGETS.values(), "native"], ids=[*TARGETS, "native"])
def test_bits(target, layout, channels, size, out, coordinates):
    if target != "native" and not machine_runs(target):
        pytest.skip("this CPU has no such instructions")
    x = random(2, *size, channels) if layout == "NHWC" else random(2, channels, *size)
    mod = program([(x.shape, None)], lambda _b, x: resized(x, out, layout, coordinates))
    (found,) = run(build(mod, target), x)
    outer, inner = (2, channels) if layout == "NHWC" else (2 * channels, 1)
    shape = ResizeShape(outer, *size, inner, out, coordinates)
    expected = reference.resize_linear(x.reshape(outer, *size, inner), shape)
    np.testing.assert_array_equal(found, expected.reshape(found.shape))


def test_threads_share_rows():
    x = random(1, 30, 40, 24)
    mod = program([(x.shape, None)], lambda _b, x: resized(x, (61, 79), "NHWC", "half_pixel"))
    assert np.array_equal(run(build(mod, "native", threads=2), x)[0], run(build(mod, "native"), x)[0])


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size, out", SIZES)
def test_numbers_are_those_of_torch(size, out, align_corners):
    torch = pytest.importorskip("torch")
    x = random(1, 3, *size)
    coordinates = "align_corners" if align_corners else "half_pixel"
    shape = ResizeShape(3, *size, 1, out, coordinates)
    found = reference.resize_linear(x.reshape(3, *size, 1), shape).reshape(1, 3, *out)
    kwargs = dict(size=out, mode="bilinear", align_corners=align_corners)
    # Torch finds places in float32, which are off by up to 2**-24 of the size.
    expected = torch.nn.functional.interpolate(torch.from_numpy(x), **kwargs).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_taps_are_neighbours_inside_the_image(coordinates):
    for size in range(1, 8):
        for out in range(1, 20):
            places, weights = linear_taps(size, out, coordinates)
            assert places.min() >= 0 and places.max() < size and np.diff(places, axis=1).max(initial=0) <= 1
            np.testing.assert_allclose(weights.sum(axis=1), 1)


@pytest.mark.parametrize("size, turned", [((20, 20), (1, 8, 10, 10)), ((4, 4), (1, 8, 4, 4))])
def test_the_result_is_turned_back_while_it_is_small(size, turned):
    def body(emit, x):
        weight = relax.const(random(8, 3, 3, 3))
        y = emit(relax.op.nn.conv2d(x, weight, padding=1))
        return emit(resized(y, size, "NCHW", "half_pixel"))

    canonical = prepare(relax_build({"x": ((1, 3, 10, 10), "float32")}, body))
    values = [binding.value for binding in canonical["main"].body.blocks[0].bindings]
    back = [value for value in values if op_name(value) == "relax.permute_dims"][-1]
    assert tuple(int(extent) for extent in back.ty.shape) == turned
