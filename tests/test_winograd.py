"""Winograd's algorithm against the direct convolution, bit for bit."""

import re
import threading
from dataclasses import replace

import numpy as np
import pytest
import tvm
from quantized_programs import TARGETS, WITHOUT_TILES, build, machine_runs, program, random_codes, run
from tvm import relax

import tvm_qfp8
from tvm_qfp8.format import LAYOUTS, encode, get_layout
from tvm_qfp8.relay_passes import conv_kernels, qfp8_ops
from tvm_qfp8.relay_passes.quantize_linear import codes_constant
from tvm_qfp8.runtime import LOADED
from tvm_qfp8.topi import reference
from tvm_qfp8.topi.conv2d import ConvShape
from tvm_qfp8.topi.isa import instruction_set
from tvm_qfp8.topi.static_memory import StaticMemory
from tvm_qfp8.topi.winograd_plan import plan_tiling, plan_winograd
from tvm_qfp8.topi.winograd_tiling import F2, F4

COMPUTED = [name for name, layout in LAYOUTS.items() if layout.exponent_bits <= 3]


def conv_shape(
    batch=1,
    height=8,
    width=8,
    channels=16,
    out=16,
    padding=(1, 1, 1, 1),
    act="UE2M6",
    weight="E2M5",
    dilation=(1, 1),
):
    layouts = get_layout(act), get_layout(weight)
    return ConvShape(batch, height, width, channels, out, (3, 3), (1, 1), padding, dilation, 1, *layouts)


def small_codes(rng, shape, layout="E2M5"):
    """Codes of a normal distribution: a trained layer's sums are far from overflow."""
    return encode(rng.standard_normal(shape).astype(np.float32) * 60, 1.0, layout)


def convolution(shape: ConvShape, weight, a, bias):
    def emit(_builder, q):
        codes = codes_constant(weight, shape.weight.name)
        options = dict(strides=shape.stride, padding=shape.padding, dilation=shape.dilation, groups=1)
        return qfp8_ops.conv2d(q, codes, relax.const(a), relax.const(bias), **options)

    x = (shape.batch, shape.height, shape.width, shape.channels)
    return program([(x, shape.activation.name)], emit)


def case(shape: ConvShape, weight=None):
    """(program, input codes, expected)"""
    rng = np.random.default_rng(shape.height)
    if weight is None:
        weight = small_codes(rng, (shape.out_channels, 3, 3, shape.channels), shape.weight.name)
    x = random_codes(rng, (shape.batch, shape.height, shape.width, shape.channels))
    a = rng.random(shape.out_channels, np.float32) * 1e-4
    bias = rng.standard_normal(shape.out_channels, np.float32)
    expected = reference.scale_and_bias(reference.conv2d(x, weight, shape), a, bias)
    return convolution(shape, weight, a, bias), x, expected


@pytest.fixture(params=list(TARGETS))
def target(request):
    if not machine_runs(request.param):
        pytest.skip(f"this CPU does not run {request.param}")
    return TARGETS[request.param]


SHAPES = [
    conv_shape(height=7, width=7, channels=16, out=33),
    conv_shape(batch=2, height=9, width=10, channels=11, out=7, padding=(0, 0, 0, 0), act="E3M4"),
    conv_shape(batch=3, height=2, width=5, channels=20, out=40, padding=(2, 0, 1, 3)),
    conv_shape(height=3, width=30, channels=9, out=100, padding=(0, 2, 1, 0), act="E2M5"),
    conv_shape(height=6, width=4, channels=400, out=20, act="UE3M5"),
    conv_shape(height=10, width=10, padding=(2, 2, 2, 2), dilation=(2, 2)),
    conv_shape(2, 15, 13, 11, 7, padding=(3, 1, 0, 4), act="E2M5", dilation=(3, 2)),
    conv_shape(height=9, width=19, channels=40, out=33, padding=(0, 4, 2, 4), dilation=(1, 4)),
    conv_shape(batch=3, height=17, width=6, padding=(6, 1, 2, 0), dilation=(4, 1), act="UE3M5"),
]


@pytest.fixture
def planned(monkeypatch):
    """``planned(tiling)``: all 3x3 convolutions take it where it is possible."""

    def take(tiling) -> None:
        monkeypatch.setattr(
            conv_kernels, "plan_winograd", lambda shape, codes, *rates: plan_tiling(tiling, shape, codes)
        )

    return take


POSSIBLE = [
    (tiling, shape)
    for shape in SHAPES
    for tiling in (F2, F4)
    if min(shape.out_height // shape.dilation[0], shape.out_width // shape.dilation[1]) >= tiling.outputs
    and tiling.offsets(shape.activation) is not None
]


@pytest.mark.parametrize("tiling, shape", POSSIBLE)
def test_winograd_is_exact(target, planned, tiling, shape):
    planned(tiling)
    module, x, expected = case(shape)
    memory = StaticMemory()
    executable = build(module, target, memory=memory)
    assert len(memory.fillers) == 1
    machine = relax.VirtualMachine(executable, tvm.cpu())
    for _ in range(2):
        assert np.array_equal(machine["main"](tvm.runtime.tensor(x)).numpy(), expected)


WEIGHTS = [name for name in COMPUTED if LAYOUTS[name].signed]
PAIRS = [(F2, name, "E2M5") for name in COMPUTED]
PAIRS += [(F2, "UE3M5", name) for name in WEIGHTS if name != "E2M5"]
PAIRS += [
    (F4, activation, weight)
    for activation in ("E1M6", "E2M5", "UE1M7", "UE2M6")
    for weight in ("E1M6", "E2M5")
]


@pytest.mark.parametrize("tiling, activation, weight", PAIRS)
def test_every_layout_is_exact(planned, tiling, activation, weight):
    planned(tiling)
    shape = conv_shape(height=5, width=5, act=activation, weight=weight)
    module, x, expected = case(shape)
    memory = StaticMemory()
    assert np.array_equal(run(build(module, WITHOUT_TILES, memory=memory), x)[0], expected)
    assert len(memory.fillers) == 1


def test_f4_is_for_small_grid_values_only():
    for name in COMPUTED:
        small = LAYOUTS[name].max_grid <= (252 if LAYOUTS[name].signed else 508)
        assert (F4.offsets(LAYOUTS[name]) is not None) == small
        if LAYOUTS[name].signed:
            assert F4.filters_fit(LAYOUTS[name]) == small


def test_the_twin_is_the_direct_convolution():
    pairs = [conv_shape(height=5, act=a, weight=w) for a in COMPUTED for w in WEIGHTS]
    for shape in [*SHAPES, *pairs]:
        rng = np.random.default_rng(0)
        x = random_codes(rng, (shape.batch, shape.height, shape.width, shape.channels))
        weight = random_codes(rng, (shape.out_channels, 3, 3, shape.channels))
        direct = reference.conv2d(x, weight, shape)
        for tiling in (F2, F4):
            assert np.array_equal(reference.winograd_conv2d(x, weight, shape, tiling), direct)


def test_parts_keep_every_sum_within_the_limit():
    """For large weights, and the largest activations that the layout has."""
    for tiling, activation in ((F2, "UE3M5"), (F4, "UE2M6"), (F4, "E2M5")):
        shape = conv_shape(channels=301, act=activation, out=8)
        codes = np.full((8, 3, 3, 301), 0x60, np.uint8)
        codes[::2] |= 0x80 * (np.arange(301) % 2).astype(np.uint8)
        plan = plan_tiling(tiling, shape, codes)
        assert plan is not None and plan.parts > 1
        grid = reference.decode_grid(codes, shape.weight).astype(np.int64)
        size = plan.depth(instruction_set("avx2")) // plan.parts
        for start in range(0, 301, size):
            part = grid[..., start : start + size]
            signs = (1, -1) if not shape.activation.signed else (0,)
            worst = [np.abs(part) if sign == 0 else np.maximum(sign * part, 0) for sign in signs]
            largest = max(value.sum((1, 2, 3)).max() for value in worst) * shape.activation.max_grid
            assert largest < tiling.limit


def test_sums_up_to_the_limit_are_exact(planned):
    """The greatest sums that F(4x4, 3x3) takes without parts."""
    planned(F4)
    shape = conv_shape(channels=58, out=4, act="E2M5")
    weight = np.full((4, 3, 3, 58), 0x7F, np.uint8)
    weight[1:3] |= 0x80
    plan = plan_tiling(F4, shape, weight)
    assert plan is not None and plan.parts == 1
    assert 0.98 * F4.limit < 9 * 58 * 252 * 252
    x = np.full((1, 8, 8, 58), 0x7F, np.uint8)
    a, bias = np.ones(4, np.float32), np.zeros(4, np.float32)
    expected = reference.scale_and_bias(reference.conv2d(x, weight, shape), a, bias)
    module = convolution(shape, weight, a, bias)
    assert np.array_equal(run(build(module, WITHOUT_TILES, memory=StaticMemory()), x)[0], expected)


def test_input_ranges_are_reached():
    rng = np.random.default_rng(0)
    for name in COMPUTED:
        layout = get_layout(name)
        for tiling in (F2, F4):
            least, greatest = tiling.input_range(layout)
            low = -layout.max_grid if layout.signed else 0
            for row, column in np.ndindex(least.shape):
                terms = np.outer(tiling.B_T[row], tiling.B_T[column])
                window = np.where(terms > 0, layout.max_grid, low)
                assert (terms * window).sum() == greatest[row, column]
                assert (terms * np.where(terms > 0, low, layout.max_grid)).sum() == least[row, column]
            window = rng.integers(low, layout.max_grid + 1, (1000, *least.shape))
            found = tiling.B_T @ window @ tiling.B_T.T
            assert (found >= least).all() and (found <= greatest).all()


def test_extreme_weights_are_exact():
    shape = conv_shape(height=4, width=4, channels=96, out=8, act="UE3M5")
    memory = StaticMemory()
    module, x, expected = case(shape, np.full((8, 3, 3, 96), 0x7F, np.uint8))
    assert np.array_equal(run(build(module, WITHOUT_TILES, memory=memory), x)[0], expected)


@pytest.mark.parametrize(
    "changed", [dict(stride=(2, 1)), dict(dilation=(1, 4)), dict(groups=2), dict(kernel=(1, 3))]
)
def test_what_it_cannot_do_is_left_alone(changed):
    shape = replace(conv_shape(), **changed)
    codes = np.zeros((16, *shape.kernel, 16 // shape.groups), np.uint8)
    assert plan_winograd(shape, codes, 32, 32) is None


def test_what_is_faster():
    def taken(size, channels, direct_rate=32, rate=32, dilation=1):
        shape = conv_shape(
            height=size,
            width=size,
            channels=channels,
            out=channels,
            padding=(dilation,) * 4,
            act="UE1M7",
            weight="E1M6",
            dilation=(dilation, dilation),
        )
        codes = small_codes(np.random.default_rng(0), (channels, 3, 3, channels), "E1M6")
        plan = plan_winograd(shape, codes, rate, direct_rate)
        return plan and plan.tiling

    assert taken(56, 64) is F4 and taken(56, 64, direct_rate=64) is F4
    assert taken(7, 512) is F2, "filters of 36 positions take longer to read than to multiply"
    assert taken(7, 512, direct_rate=64) is None
    assert taken(7, 512, direct_rate=8, rate=8) is F4, "but not where multiplying takes longer"
    assert taken(4, 64) is F4 and taken(3, 64) is F2
    assert taken(56, 3) is None
    assert taken(56, 8) is F4 and taken(56, 8, direct_rate=64) is None
    assert taken(28, 64, dilation=2) is F4 and taken(40, 64, dilation=12) is F2
    assert taken(20, 16, dilation=2) is F4 and taken(20, 16, direct_rate=64, dilation=2) is None
    assert taken(20, 64, dilation=8) is None, "images of 2 and 3 pixels"


def test_threads_give_the_same_bits():
    for shape in (conv_shape(height=40, width=40, channels=32, out=40), conv_shape(4, 4, 4, 256, 512)):
        module, x, expected = case(shape)
        assert np.array_equal(
            run(build(module, WITHOUT_TILES, threads=2, memory=StaticMemory()), x)[0], expected
        )


def test_filters_are_made_once_by_machines_that_start_together():
    module, x, expected = case(conv_shape(height=12, width=12, channels=128, out=128))
    executable = build(module, WITHOUT_TILES, memory=StaticMemory())
    barrier, results = threading.Barrier(4), []

    def call() -> None:
        machine = relax.VirtualMachine(executable, tvm.cpu())
        barrier.wait()
        results.append(machine["main"](tvm.runtime.tensor(x)).numpy())

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(np.array_equal(result, expected) for result in results)


def test_modules_of_one_process_do_not_share_memory():
    cases = [case(conv_shape(height=height)) for height in (8, 9)]
    machines = [
        relax.VirtualMachine(build(module, WITHOUT_TILES, memory=StaticMemory()), tvm.cpu())
        for module, *_ in cases
    ]
    for _ in range(2):
        for machine, (_, x, expected) in zip(machines, cases, strict=True):
            assert np.array_equal(machine["main"](tvm.runtime.tensor(x)).numpy(), expected)


def network(channels: int = 64) -> tvm.IRModule:
    """Two equal 3x3 convolutions with different weights."""
    rng = np.random.default_rng(0)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, channels, 10, 10), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            value = x
            for _ in range(2):
                weight = rng.standard_normal((channels, channels, 3, 3)).astype(np.float32)
                value = builder.emit(relax.op.nn.conv2d(value, relax.const(weight), padding=(1, 1)))
                value = builder.emit(relax.op.nn.relu(value))
            output = builder.emit_output(value)
        builder.emit_func_output(output)
    return builder.get()


def test_a_saved_module_holds_codes_only(tmp_path):
    rng = np.random.default_rng(0)
    samples = [{"x": rng.standard_normal((1, 64, 10, 10)).astype(np.float32)} for _ in range(4)]
    sizes, results = [], []
    for winograd in (True, False):
        # In linear layouts bytes are multiplied, without a transformation.
        config = tvm_qfp8.Config(activations="E2M5", winograd=winograd)
        compiled = tvm_qfp8.compile(network(), WITHOUT_TILES, calibration=samples, config=config)
        assert (LOADED in compiled.report.totals) == winograd
        path = tmp_path / f"{winograd}.so"
        compiled.export_library(path)
        results += [compiled.run(samples[0])[0], tvm_qfp8.load(path).run(samples[0])[0]]
        sizes.append(path.stat().st_size)
        if winograd:
            assert re.fullmatch(r"\d+ \(2 layers, made in [\d.]+ ms\)", compiled.report.totals[LOADED])
    for result in results[1:]:
        assert np.array_equal(result, results[0])
    # Two layers of 64 * 64 * 36 int16 would be 576 KiB.
    assert sizes[0] - sizes[1] < 64 * 1024


@pytest.mark.aarch64
@pytest.mark.parametrize("tiling, shape", POSSIBLE[:4])
def test_winograd_on_aarch64(run_aarch64, planned, tiling, shape):
    planned(tiling)
    module, x, expected = case(shape)
    executable = build(module, "aarch64", memory=StaticMemory())
    assert np.array_equal(run_aarch64(executable, [x])[0], expected)
