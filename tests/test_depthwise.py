"""Depthwise convolutions against the NumPy twin, exactly: every phase, padding and tile of the paired slab."""

import numpy as np
import pytest
from quantized_programs import TARGETS, build, machine_runs, program, random_codes, run
from tvm import relax

from tvm_qfp8.format import get_layout
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.quantize_linear import codes_constant
from tvm_qfp8.topi import reference
from tvm_qfp8.topi.conv2d import ConvShape
from tvm_qfp8.topi.depthwise import _whole_tiles

WIDTH, KERNEL, STRIDE, PADDING = range(4)
CASES = [
    (14, (3, 3), (1, 1), (1, 1, 1, 1)),
    (15, (3, 3), (1, 1), (1, 1, 1, 1)),
    (11, (3, 2), (1, 1), (0, 2, 1, 0)),
    (9, (1, 5), (1, 3), (0, 3, 0, 2)),
    (16, (3, 3), (2, 2), (0, 0, 1, 1)),
    (21, (5, 5), (2, 2), (2, 2, 2, 2)),
    (1, (3, 3), (1, 1), (1, 1, 1, 1)),
    (10, (2, 4), (1, 1), (1, 0, 0, 1)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("target", [*TARGETS, "native"])
def test_sums(target, case):
    check_sums(target, case, channels=40)


@pytest.mark.parametrize("channels", [2, 3, 5, 8, 12, 15])
@pytest.mark.parametrize("target", [*TARGETS, "native"])
def test_fewer_channels_than_a_vector_has_lanes(target, channels):
    check_sums(target, CASES[1], channels)


def check_sums(target, case, channels):
    if target != "native" and not machine_runs(target):
        pytest.skip(f"this CPU has no {target}")
    rng = np.random.default_rng(0)
    x = random_codes(rng, (1, 6, case[WIDTH], channels))
    weight = random_codes(rng, (channels, *case[KERNEL], 1))
    ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    layouts = get_layout("UE2M6"), get_layout("E2M5")

    def emit(builder, x):
        return builder.emit(
            qfp8_ops.conv2d(
                x,
                codes_constant(weight, "E2M5"),
                relax.const(ones),
                relax.const(zeros),
                strides=case[STRIDE],
                padding=case[PADDING],
                dilation=(1, 1),
                groups=channels,
            )
        )

    (found,) = run(build(program([(x.shape, "UE2M6")], emit), TARGETS.get(target, target)), x)
    shape = ConvShape(*x.shape, channels, *case[1:], (1, 1), channels, *layouts)
    np.testing.assert_array_equal(found, reference.conv2d(x, weight, shape).astype(np.float32))


@pytest.mark.parametrize("phases", [1, 2])
@pytest.mark.parametrize("tile", range(1, 10))
def test_tiles_cover_a_row_and_start_at_the_first_phase(tile, phases):
    for width in range(1, 30):
        pixels, step = _whole_tiles(tile, width, phases)
        starts = [min(at, width - pixels) for at in range(0, max(1, width - pixels + step), step)]
        assert set(range(width)) == {start + i for start in starts for i in range(pixels)}
        assert all(start % phases == 0 for start in starts)
