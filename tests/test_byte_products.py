"""Byte products: bytes of grid values, or their parts, give the integers that int16 products give, bit for bit."""

import itertools

import numpy as np
import pytest
from quantized_programs import build, dense_program, program, random_codes, run
from tvm import relax

from tvm_qfp8.code_generation import generate_code
from tvm_qfp8.cpu_features import cpuinfo_flags
from tvm_qfp8.format import get_layout
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.conv_kernels import conv_shape
from tvm_qfp8.relay_passes.lower_groups import LowerGroups
from tvm_qfp8.relay_passes.quantize_linear import codes_constant
from tvm_qfp8.relay_passes.schedule_rest import ScheduleRest
from tvm_qfp8.targets import cpu_features, parse_target
from tvm_qfp8.targets import isa as isa_of
from tvm_qfp8.topi import reference
from tvm_qfp8.topi.isa import instruction_set
from tvm_qfp8.topi.split import split_of

ACTIVATIONS = ["E1M6", "UE1M7", "E2M5", "UE2M6", "E3M4", "UE3M5"]
TARGETS = {
    "mull": "llvm -mtriple=aarch64-linux-gnu -mattr=+neon",
    "dotprod": "llvm -mtriple=aarch64-linux-gnu -mattr=+neon,+dotprod",
    "i8mm": "llvm -mtriple=aarch64-linux-gnu -mattr=+neon,+dotprod,+i8mm",
}


@pytest.mark.parametrize("activation, weight", list(itertools.product(ACTIVATIONS, ["E2M5", "E3M4", "E1M6"])))
def test_every_product_of_grid_values(activation, weight):
    x, w = get_layout(activation), get_layout(weight)
    split = split_of(x, w)
    total = np.zeros((256, 256), np.int64) - split.offset * w.grid.astype(np.int64)
    for factor, x_part, w_part in zip(split.factors, split.activation, split.weight, strict=True):
        left, right = split.part(x_part, x.grid) + split.offset, split.part(w_part, w.grid)
        assert min(left.min(), right.min()) >= -128 and max(left.max(), right.max()) <= 127
        total += factor * np.multiply.outer(left, right)
    assert np.array_equal(total, np.multiply.outer(x.grid.astype(np.int64), w.grid.astype(np.int64)))


@pytest.mark.parametrize("activation", ["E1M6", "UE1M7"])
def test_unsigned_bytes(activation):
    x, w = get_layout(activation), get_layout("E1M6")
    split = split_of(x, w, unsigned=True, one_product=True)
    found = split.part("whole", x.grid) + split.offset
    assert found.min() >= 0 and found.max() <= 255 and split.products == 1


@pytest.mark.parametrize("unsigned", [True, False])
def test_one_product_is_for_linear_layouts(unsigned):
    assert split_of(get_layout("E2M5"), get_layout("E1M6"), unsigned, one_product=True) is None
    assert split_of(get_layout("E1M6"), get_layout("E2M5"), unsigned, one_product=True) is None


def test_two_products_of_bytes_fit_int16():
    for activation in ("E1M6", "UE1M7"):
        x, w = get_layout(activation), get_layout("E1M6")
        split = split_of(x, w, one_product=True)
        largest = np.abs(split.part("whole", x.grid) + split.offset).max() * np.abs(w.grid.astype(int)).max()
        assert 2 * largest < 2**15


def test_bound_covers_every_partial_sum():
    rng = np.random.default_rng(0)
    x, w = get_layout("UE3M5"), get_layout("E2M5")
    split = split_of(x, w)
    weight = w.grid[rng.integers(0, 256, (5, 40))].astype(np.int64)
    extreme = x.grid[rng.integers(200, 256, (3, 40))].astype(np.int64)
    worst = sum(
        abs(factor) * np.abs(split.part(xp, extreme)) @ np.abs(split.part(wp, weight)).T
        for factor, xp, wp in zip(split.factors, split.activation, split.weight, strict=True)
    )
    assert worst.max() <= split.largest_sum(weight, x)


@pytest.mark.parametrize("name", TARGETS)
def test_the_target_decides(name):
    parsed = parse_target(TARGETS[name])
    found = instruction_set(isa_of(parsed), cpu_features(parsed))
    assert found.in_bytes(get_layout("UE1M7"), get_layout("E1M6"), True).label == f"neon+{name}"
    splits = name != "mull"
    assert (found.in_bytes(get_layout("UE2M6"), get_layout("E2M5"), True).split is not None) == splits


@pytest.mark.parametrize("mnemonic, name", [("sadalp", "mull"), ("sdot", "dotprod"), ("smmla", "i8mm")])
def test_the_instruction_is_used(mnemonic, name):
    executable = build(dense_program(20, 24, 64, "E1M6", "E1M6")[0], TARGETS[name])
    modules = [executable.mod, *executable.mod.imports]
    text = "".join(m.inspect_source("s") for m in modules if m.kind == "llvm")
    assert f"\t{mnemonic}\t" in text


MATMULS = [
    (7, 5, 3, "UE2M6", "E2M5"),
    (8, 4, 16, "E3M4", "E2M5"),
    (50, 70, 30, "UE3M5", "E2M5"),
    (131, 33, 65, "E3M4", "E2M5"),
    (49, 48, 128, "UE2M6", "E2M5"),
    (9, 8, 33, "E1M6", "E2M5"),
    (1, 33, 70, "UE2M6", "E2M5"),
    (9, 8, 33, "E1M6", "E1M6"),
    (50, 70, 30, "UE1M7", "E1M6"),
    (64, 96, 32, "UE1M7", "E1M6"),
    (1, 33, 70, "E1M6", "E1M6"),
    (5, 17, 256, "UE1M7", "E1M6"),
]


@pytest.mark.aarch64
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("rows, columns, depth, layout, weight", MATMULS)
def test_matmul(run_aarch64, target, rows, columns, depth, layout, weight):
    mod, x, expected = dense_program(rows, columns, depth, layout, weight)
    assert np.array_equal(run_aarch64(build(mod, target), [x])[0], expected)


CONVOLUTIONS = [
    ((9, 11), 3, 8, (3, 3), 2, 1, 1, 1),
    ((7, 7), 16, 33, (3, 3), 1, 1, 1, 1),
    ((6, 5), 20, 40, (1, 1), 1, 0, 1, 1),
    ((12, 13), 6, 9, (3, 2), 2, 1, 2, 3),
    ((9, 11), 32, 32, (3, 3), 1, 1, 1, 8),  # groups of 4 channels, merged
    ((9, 30), 12, 2, (5, 9), 1, 4, 1, 1),  # taps are columns
    ((5, 9), 20, 20, (4, 4), 1, 2, 1, 1, 2),  # transposed: a convolution for each place in a stride
    ((5, 9), 24, 24, (4, 4), 1, 2, 1, 24, 2),
]
LAYOUTS = [("UE2M6", "E2M5"), ("E1M6", "E1M6"), ("UE1M7", "E1M6")]


def _convolution(
    layout, weight_layout, size, channels, out, kernel, stride, padding, dilation, groups, spread=1
):
    rng = np.random.default_rng(channels)
    weight = random_codes(rng, (out, *kernel, channels // groups))
    x = random_codes(rng, (2, *size, channels))
    a, bias = rng.random(out, np.float32) * 1e-4, rng.standard_normal(out, np.float32)
    shapes = []

    def emit(builder, q):
        call = qfp8_ops.conv2d(
            q,
            codes_constant(weight, weight_layout),
            relax.const(a),
            relax.const(bias),
            strides=(stride, stride),
            padding=(padding,) * 4,
            dilation=(dilation, dilation),
            groups=groups,
            input_dilation=(spread, spread),
        )
        shapes.append(conv_shape(call))
        return call

    mod = program([(x.shape, layout)], emit)
    return mod, x, reference.scale_and_bias(reference.conv2d(x, weight, shapes[0]), a, bias)


@pytest.mark.aarch64
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("layout, weight", LAYOUTS)
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_conv2d(run_aarch64, target, shape, layout, weight):
    mod, x, expected = _convolution(layout, weight, *shape)
    assert np.array_equal(run_aarch64(build(mod, target), [x])[0], expected)


X86 = {"avx512": "llvm -mcpu=icelake-server", "avx2": "llvm -mcpu=alderlake"}


@pytest.mark.parametrize("name", X86)
def test_vnni_is_used(name):
    for layout, used in (("UE1M7", True), ("E1M6", True), ("E2M5", False)):
        executable = build(dense_program(20, 24, 64, layout, "E1M6")[0], X86[name])
        modules = [executable.mod, *executable.mod.imports]
        text = "".join(m.inspect_source("s") for m in modules if m.kind == "llvm")
        assert ("vpdpbusd" in text) == used


needs_vnni = pytest.mark.skipif(
    "avx512_vnni" not in cpuinfo_flags(), reason="this machine has no AVX-512 VNNI to run vpdpbusd"
)
LANES = {16: "native", 8: "llvm -mcpu=haswell -mattr=+avx512vnni,+avx512vl"}
"""Both vector lengths; AVX-512 encodes the shorter one too."""


def _build_vnni(mod, lanes: int):
    target = parse_target(LANES[lanes])
    found = instruction_set({16: "avx512", 8: "avx2"}[lanes], {"avx512vnni", "avxvnni"})
    with target:
        mod = ScheduleRest(found, 1)(relax.transform.LegalizeOps()(LowerGroups(found, 1)(mod)))
        return generate_code(mod, target)


@needs_vnni
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("rows, columns, depth, layout, weight", MATMULS[-5:])
def test_matmul_vnni(lanes, rows, columns, depth, layout, weight):
    mod, x, expected = dense_program(rows, columns, depth, layout, weight)
    assert np.array_equal(run(_build_vnni(mod, lanes), x)[0], expected)


@needs_vnni
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("layout, weight", LAYOUTS[1:])
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_conv2d_vnni(lanes, shape, layout, weight):
    mod, x, expected = _convolution(layout, weight, *shape)
    assert np.array_equal(run(_build_vnni(mod, lanes), x)[0], expected)


def test_rate_counts_products_of_an_instruction_that_multiplies():
    """An instruction of VNNI makes twice as many of bytes; of Arm's dot products three are needed for split values."""
    linear, split = (get_layout("UE1M7"), get_layout("E1M6")), (get_layout("UE2M6"), get_layout("E2M5"))
    for name, features, layouts, times in (
        ("avx512", ["avx512vnni"], linear, 2),
        ("neon", [], linear, 2),
        ("neon", ["dotprod"], linear, 4),
        ("neon", ["dotprod"], split, 4 / 3),
        ("avx2", [], linear, 1),
    ):
        found = instruction_set(name, features)
        assert found.in_bytes(*layouts, dense=False).rate == pytest.approx(times * found.rate)
