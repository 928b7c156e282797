"""Kernels on tile registers (AMX) against their NumPy twins, bit for bit: shapes, layouts, blocks of exact sums."""

import itertools

import numpy as np
import pytest
from quantized_programs import (
    TILES,
    WITHOUT_TILES,
    build,
    dense_program,
    machine_runs,
    program,
    random_codes,
    run,
)
from tile_emulator import emulate_tiles
from tvm import relax

from tvm_qfp8.format import decode_grid, get_layout
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.conv_kernels import conv_shape
from tvm_qfp8.relay_passes.quantize_linear import codes_constant
from tvm_qfp8.topi import reference
from tvm_qfp8.topi.amx import tiles
from tvm_qfp8.topi.amx.plan import (
    BLOCK,
    BYTE,
    best_block,
    part,
    plan_kind,
    plan_tiles,
    shares_rows,
    tile_kinds,
)
from tvm_qfp8.topi.amx.tiles import ROW_BYTES, ROWS
from tvm_qfp8.topi.batch_matmul import BatchMatmulShape
from tvm_qfp8.topi.conv2d import ConvShape, merged_groups
from tvm_qfp8.topi.slab import SlabRows, slab_rows
from tvm_qfp8.topi.transposed import phases_of

ACTIVATIONS = ["E1M6", "UE1M7", "E2M5", "UE2M6", "E3M4", "UE3M5"]
WEIGHTS = ["E1M6", "E2M5", "E3M4"]


@pytest.fixture
def on_tiles(monkeypatch):
    """Runs a test on the CPU's tile registers, or on emulated ones."""
    if not machine_runs(TILES):
        emulate_tiles(monkeypatch)


def dense(rows: int, columns: int, depth: int, activation: str, weight: str, threads: int = 1) -> None:
    module, x, expected = dense_program(rows, columns, depth, activation, weight)
    assert np.array_equal(run(build(module, TILES, threads), x)[0], expected)


@pytest.mark.usefixtures("on_tiles")
@pytest.mark.parametrize("activation, weight", list(itertools.product(ACTIVATIONS, WEIGHTS)))
@pytest.mark.parametrize("rows, columns, depth", [(33, 50, 70), (64, 32, 1100)])
def test_every_layout_is_exact(activation, weight, rows, columns, depth):
    dense(rows, columns, depth, activation, weight)


@pytest.mark.usefixtures("on_tiles")
@pytest.mark.parametrize("rows", [7, 16, 17, 49, 300])
@pytest.mark.parametrize("columns, depth", [(1, 1), (5, 3), (17, 32), (130, 257)])
@pytest.mark.parametrize("layouts", [("E2M5", "E2M5"), ("UE1M7", "E1M6")])
def test_every_shape_is_exact(rows, columns, depth, layouts):
    dense(rows, columns, depth, *layouts)


@pytest.mark.usefixtures("on_tiles")
@pytest.mark.parametrize(
    "rows, columns, depth", [(400, 70, 200), (64, 300, 200), (150, 20, 600), (200, 1100, 260)]
)
@pytest.mark.parametrize("layouts", [("E2M5", "E2M5"), ("UE1M7", "E1M6"), ("UE3M5", "E3M4")])
def test_threads_share_rows_or_panels(rows, columns, depth, layouts):
    dense(rows, columns, depth, *layouts, threads=2)


CONVOLUTIONS = [
    # height, width, channels, out, kernel, stride, padding, dilation
    (9, 37, 5, 20, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    (7, 7, 64, 33, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    (12, 13, 40, 9, (3, 2), (1, 2), (2, 0, 1, 1), (2, 1)),
    (9, 11, 24, 24, (3, 3), (2, 2), (1, 1, 1, 1), (1, 2)),
    (10, 9, 5, 70, (1, 1), (2, 2), (0, 0, 0, 0), (1, 1)),
    (1, 40, 18, 18, (1, 7), (1, 1), (0, 3, 0, 3), (1, 1)),
    (3, 3, 8, 4, (3, 3), (1, 1), (0, 0, 0, 0), (1, 1)),
    (6, 8, 64, 520, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
]


GROUPED = [
    # groups, then as above: narrow ones that are merged to several or to one, wide ones, more outputs than inputs
    (12, 9, 21, 48, 48, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    (5, 8, 9, 120, 120, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    (32, 6, 7, 128, 128, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    (3, 7, 20, 15, 66, (3, 2), (1, 1), (1, 0, 1, 1), (2, 2)),
    (2, 5, 6, 140, 36, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    (4, 16, 17, 8, 8, (5, 5), (1, 1), (2, 2, 2, 2), (1, 1)),
]


@pytest.mark.usefixtures("on_tiles")
@pytest.mark.parametrize("case", [*((1, *case) for case in CONVOLUTIONS), *GROUPED], ids=str)
@pytest.mark.parametrize(
    "layouts", [("UE2M6", "E2M5"), ("E1M6", "E1M6"), ("UE3M5", "E3M4"), ("E2M5", "E1M6")]
)
@pytest.mark.parametrize("batch, threads", [(1, 1), (2, 2)])
def test_convolutions_are_exact(case, layouts, batch, threads):
    groups, height, width, channels, out, kernel, stride, padding, dilation = case
    rng = np.random.default_rng(height)
    codes, x = (
        random_codes(rng, (out, *kernel, channels // groups)),
        random_codes(rng, (batch, height, width, channels)),
    )
    a, bias = rng.random(out, np.float32) * 1e-4, rng.standard_normal(out, np.float32)
    shape = None

    def emit(_builder, q):
        nonlocal shape
        call = qfp8_ops.conv2d(
            q, codes_constant(codes, layouts[1]), relax.const(a), relax.const(bias),
            strides=stride, padding=padding, dilation=dilation, groups=groups,
        )  # fmt: skip
        shape = conv_shape(call)
        return call

    quantized = program([(x.shape, layouts[0])], emit)
    expected = reference.scale_and_bias(reference.conv2d(x, codes, shape), a, bias)
    assert np.array_equal(run(build(quantized, TILES, threads), x)[0], expected)


@pytest.mark.usefixtures("on_tiles")
@pytest.mark.parametrize("layouts", [("UE2M6", "E2M5"), ("E1M6", "E1M6")])
@pytest.mark.parametrize("kernel, groups", [((4, 4), 1), ((3, 4), 2), ((4, 3), 24)])
@pytest.mark.parametrize("threads", [1, 2])
def test_transposed_convolutions_are_exact(layouts, kernel, groups, threads):
    """A convolution for each place in a stride, all with weights in one constant."""
    rng = np.random.default_rng(0)
    codes, x = random_codes(rng, (48, *kernel, 48 // groups)), random_codes(rng, (2, 9, 17, 48))
    a, bias = rng.random(48, np.float32) * 1e-4, rng.standard_normal(48, np.float32)
    window = dict(strides=(1, 1), padding=(2, 2, 2, 2), dilation=(1, 1), groups=groups, input_dilation=(2, 2))
    shape = None

    def emit(_builder, q):
        nonlocal shape
        call = qfp8_ops.conv2d(
            q, codes_constant(codes, layouts[1]), relax.const(a), relax.const(bias), **window
        )
        shape = conv_shape(call)
        return call

    found = run(build(program([(x.shape, layouts[0])], emit), TILES, threads), x)[0]
    assert len(phases_of(shape)) == 4
    expected = reference.scale_and_bias(reference.conv2d(x, codes, shape), a, bias)
    assert np.array_equal(found, expected)


@pytest.mark.usefixtures("on_tiles")
@pytest.mark.parametrize("target", [TILES, WITHOUT_TILES])
@pytest.mark.parametrize("threads", [1, 2])
def test_taps_far_apart(target, threads):
    """The slab holds the rows that one output row meets, of many that the filter reaches over."""
    rng = np.random.default_rng(0)
    codes, x = random_codes(rng, (9, 3, 3, 640)), random_codes(rng, (1, 16, 16, 640))
    ones, zeros = np.ones(9, np.float32), np.zeros(9, np.float32)
    window = dict(strides=(1, 1), padding=(12,) * 4, dilation=(12, 12), groups=1)
    shape = None

    def emit(_builder, q):
        nonlocal shape
        call = qfp8_ops.conv2d(
            q, codes_constant(codes, "E1M6"), relax.const(ones), relax.const(zeros), **window
        )
        shape = conv_shape(call)
        return call

    found = run(build(program([(x.shape, "E2M5")], emit), target, threads), x)[0]
    assert np.array_equal(found, reference.conv2d(x, codes, shape).astype(np.float32))


def test_a_slab_holds_what_is_fewest():
    def rows(dilation, most_rows, most_block=16, stride=1, threads=1):
        shape = ConvShape(
            1, 16 * stride, 16, 8, 8, (3, 3), (stride, 1), (dilation,) * 4, (dilation, dilation), 1,
            get_layout("E1M6"), get_layout("E1M6"),
        )  # fmt: skip
        return slab_rows(shape, most_rows, most_block, threads)

    assert rows(1, 18) == SlabRows(16, 1, 18, 1)
    assert rows(1, 10) == SlabRows(8, 2, 10, 1)
    assert rows(1, 1) == SlabRows(1, 16, 3, 1)
    assert rows(12, 40) == SlabRows(16, 1, 40, 1)
    assert rows(12, 27) == SlabRows(1, 16, 3, 12)  # 6 blocks of 27 rows would be more
    assert rows(1, 80, stride=4) == SlabRows(16, 1, 63, 1)  # rows between windows are no reason
    assert rows(2, 20, most_block=8) == SlabRows(8, 2, 12, 1)
    assert rows(1, 8) == SlabRows(6, 3, 8, 1)
    assert rows(1, 8, threads=2) == SlabRows(4, 4, 6, 1)  # two for each thread


@pytest.mark.parametrize(
    "channels, groups, kept",
    [
        (48, 2, 1),  # 24 fill three quarters of two tiles, 48 all of three
        (120, 5, 5),  # five are 120, of which a row of a tile holds 64
        (336, 14, 7),
        (128, 32, 2),  # as many products as of 16 channels, in fewer groups
        (64, 2, 1),
        (74, 37, 37),
    ],
)
def test_groups_are_merged_to_fill_tiles(channels, groups, kept):
    shape = ConvShape(
        1, 4, 4, channels, channels, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), groups,
        get_layout("E1M6"), get_layout("E1M6"),
    )  # fmt: skip
    codes = random_codes(np.random.default_rng(0), (channels, 3, 3, channels // groups))
    merged, wide = merged_groups(shape, codes, ROW_BYTES, ROWS, most_inputs=ROW_BYTES)
    assert merged.groups == kept
    x = random_codes(np.random.default_rng(1), (1, 4, 4, channels))
    assert np.array_equal(reference.conv2d(x, wide, merged), reference.conv2d(x, codes, shape))


@pytest.mark.usefixtures("on_tiles")
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    "rows, columns, depth", [(5, 7, 9), (20, 33, 16), (64, 64, 32), (64, 32, 65), (3, 50, 700)]
)
@pytest.mark.parametrize(
    "layouts", [("E2M5", "E2M5"), ("UE2M6", "E2M5"), ("UE3M5", "E3M4"), ("E1M6", "UE1M7")]
)
def test_products_of_activations_are_exact(transpose, rows, columns, depth, layouts):
    rng = np.random.default_rng(depth)
    y_shape = (3, columns, depth) if transpose else (3, depth, columns)
    x, y = random_codes(rng, (3, rows, depth)), random_codes(rng, y_shape)
    shape = BatchMatmulShape(3, rows, columns, depth, *map(get_layout, layouts), transpose)

    def emit(_builder, a, b):
        return qfp8_ops.batch_matmul(a, b, 0.25, transpose_y=transpose)

    quantized = program([(x.shape, layouts[0]), (y.shape, layouts[1])], emit)
    expected = reference.batch_matmul(x, y, shape) * np.float32(0.25)
    for threads in (1, 2):
        assert np.array_equal(run(build(quantized, TILES, threads), x, y)[0], expected)


@pytest.mark.usefixtures("on_tiles")
@pytest.mark.parametrize("batch, columns", [(0, 8), (2, 0)])
def test_nothing_is_computed_of_nothing(batch, columns):
    dense(0, 8, 8, "E2M5", "E2M5")
    dense(16, 0, 8, "E2M5", "E2M5")
    x, y = np.zeros((batch, 8, 8), np.uint8), np.zeros((batch, 8, columns), np.uint8)

    def emit(_builder, a, b):
        return qfp8_ops.batch_matmul(a, b, 0.25, transpose_y=False)

    compiled = build(program([(x.shape, "E2M5"), (y.shape, "E2M5")], emit), TILES)
    assert run(compiled, x, y)[0].shape == (batch, 8, columns)


@pytest.mark.parametrize("activation, weight", list(itertools.product(ACTIVATIONS, WEIGHTS)))
def test_blocks_are_exact(activation, weight):
    """Parts of activations are numbers that the registers take, and no partial sum of a block reaches 2**24."""
    layouts = get_layout(activation), get_layout(weight)
    codes = random_codes(np.random.default_rng(0), (20, 3, 90))
    for kind in tile_kinds(*layouts):
        check_blocks(plan_kind(kind, codes, layouts, 100, 1), layouts, codes)


def check_blocks(plan, layouts, codes):
    assert plan.block <= BLOCK and plan.blocks * plan.block >= plan.real_products
    grid = layouts[0].grid
    parts = [part(grid, plan.shift, high) for high in (True, False)] if plan.shift else [grid]
    assert np.array_equal(sum(p << s for p, s in zip(parts, (plan.shift, 0), strict=False)), grid)
    if plan.kind.name != "bf16":
        assert max(np.abs(values).max() for values in parts) <= (255 if plan.kind.name == "uint8" else BYTE)
        return
    for values in parts:
        assert not np.any(values.astype(np.float32).view(np.uint32) & 0xFFFF)
    padded = np.zeros((20, 3, plan.chunks * plan.steps), np.uint8)
    padded[:, :, :90] = codes
    magnitudes = np.abs(decode_grid(padded, layouts[1])).reshape(20, -1)
    for first in range(0, magnitudes.shape[1], plan.block * plan.steps):
        block = magnitudes[:, first : first + plan.block * plan.steps].sum(1).max()
        assert block * max(np.abs(values).max() for values in parts) < 2**24


@pytest.mark.parametrize("layout", ["E3M4", "UE2M6"])
def test_two_bytes_or_bfloat16(layout):
    """Weights that are bytes need no decoding, but two parts of activations a sum each: long sums of few rows win."""
    layouts = get_layout(layout), get_layout("E1M6")

    def kind(rows, depth):
        return plan_tiles(np.full((64, 1, depth), 127, np.uint8), layouts, rows).kind.name

    assert kind(128, 768) == "int8" and kind(3136, 32) == "bf16"


@pytest.mark.parametrize(
    "layouts, instruction",
    [
        (("E2M5", "E2M5"), "tdpbf16ps"),
        (("E1M6", "E1M6"), "tdpbssd"),
        (("UE1M7", "E1M6"), "tdpbusd"),
        (("E3M4", "E1M6"), "tdpbssd"),
    ],
)
def test_the_target_decides(layouts, instruction):
    """LLVM's Sapphire Rapids has tiles, on whatever machine the module is compiled."""
    module, _, _ = dense_program(32, 40, 100, *layouts)
    executable = build(module, "llvm -mtriple=x86_64-linux-gnu -mcpu=sapphirerapids")
    assembly = "".join(module.inspect_source("asm") for module in executable.mod.imports)
    assert instruction in assembly
    without = build(module, "llvm -mtriple=x86_64-linux-gnu -mcpu=icelake-server")
    assert "tmm" not in "".join(module.inspect_source("asm") for module in without.mod.imports)


def test_threads_share_what_is_larger():
    assert shares_rows(weight_bytes=3 << 20, activation_bytes=4 << 20)
    assert not shares_rows(weight_bytes=3 << 20, activation_bytes=2 << 20)
    assert shares_rows(weight_bytes=1 << 18, activation_bytes=1)  # they stay in each core's cache


@pytest.mark.parametrize(
    "tiles, rows, block",
    [
        ((8, 24), 16, (2, 2)),
        ((196, 1), 16, (4, 1)),
        ((1, 60), 16, (1, 4)),
        ((1, 1), 16, (1, 1)),
        ((7, 32), 7, (4, 1)),
    ],
)
def test_blocks_of_tiles_cover_a_matrix_with_few_loads(tiles, rows, block):
    assert best_block(tiles, rows, products=24, column_bytes=24 * 1024) == block


@pytest.mark.parametrize(
    "layouts", [("E2M5", "E2M5"), ("E1M6", "E1M6"), ("UE1M7", "E1M6"), ("UE3M5", "E3M4"), ("UE3M5", "E1M6")]
)
def test_the_emulator_gives_the_same(monkeypatch, layouts):
    emulate_tiles(monkeypatch)
    dense(49, 70, 300, *layouts)


def test_a_refused_process_is_told(monkeypatch):
    emulate_tiles(monkeypatch)
    monkeypatch.setattr(tiles, "_ASK", "define linkonce_odr hidden i32 @qfp8_ask_for_tiles() { ret i32 1 }")
    with pytest.raises(RuntimeError, match="does not let the process use the CPU's tile registers"):
        dense(32, 32, 32, "E2M5", "E2M5")
