"""CUDA kernels: run by an emulator of the language on a CPU, compiled by nvcc, and, with a GPU, on it."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import tvm
from cuda_emulator import cuda_source, run_kernel

import tvm_qfp8
from tvm_qfp8 import cuda_code
from tvm_qfp8.format import get_layout
from tvm_qfp8.targets import parse_target
from tvm_qfp8.topi import reference
from tvm_qfp8.topi.conv2d import ConvShape
from tvm_qfp8.topi.cuda.conv_plan import ConvPlan, IntegerPlan, as_integers, pack_weights, plan_conv
from tvm_qfp8.topi.cuda.device import decode_pairs, grid_exponent
from tvm_qfp8.topi.cuda.direct_conv import emit_direct_conv, pack_direct_weights
from tvm_qfp8.topi.cuda.gemm import emit_conv
from tvm_qfp8.topi.cuda.gemv import GemvPlan, emit_gemv, plan_gemv
from tvm_qfp8.topi.cuda.gemv import pack_weights as pack_gemv_weights
from tvm_qfp8.topi.exact_sums import EXACT, exact_steps
from tvm_qfp8.topi.gemm import GemmShape
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, store

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
NEEDS_NVCC = pytest.mark.skipif(cuda_code.find_nvcc() is None, reason="nvcc is not installed")
NEEDS_GPU = pytest.mark.skipif(not tvm.runtime.enabled("cuda"), reason="this machine has no NVIDIA GPU")
LAYOUTS = ("E1M6", "E2M5", "E3M4", "UE1M7", "UE2M6", "UE3M5")


def random_codes(rng, shape, layout):
    """Codes of rounded normal values, without NaN."""
    codes = rng.integers(0, 256, shape, np.uint8)
    if get_layout(layout).signed:
        codes[codes == 0x80] = 0
    return codes


def conv(height, width, channels, outputs, kernel=(1, 1), stride=(1, 1), padding=(0, 0, 0, 0), **more):
    layouts = get_layout(more.pop("activation", "E3M4")), get_layout(more.pop("weight", "E2M5"))
    dilation, groups = more.pop("dilation", (1, 1)), more.pop("groups", 1)
    extents = 1, height, width, channels, outputs
    return ConvShape(*extents, kernel, stride, padding, dilation, groups, *layouts, **more)


CONVOLUTIONS = {
    "dense, ragged": conv(1, 70, 96, 72),
    "3x3, stride, padding": conv(7, 9, 24, 40, (3, 3), (2, 1), (1, 0, 1, 2), activation="UE2M6"),
    "dilated, 4 codes a load": conv(7, 9, 20, 40, (3, 3), (1, 1), (1, 1, 1, 1), dilation=(2, 1)),
    "odd channels": conv(5, 9, 11, 33, (2, 3), activation="E2M5"),
    "int8, ragged": conv(1, 70, 96, 72, activation="E1M6", weight="E1M6"),
    "uint8, 3x3, odd channels": conv(
        7, 9, 20, 40, (3, 3), (2, 1), (1, 0, 1, 2), activation="UE1M7", weight="E1M6"
    ),
    "largest grid values": conv(1, 33, 64, 35, activation="UE3M5"),
}
DIRECT = {
    "depthwise": conv(6, 7, 20, 20, (3, 3), (2, 1), (1, 1, 1, 1), groups=20),
    "groups": conv(5, 6, 6, 9, (3, 2), groups=3),
    "transposed": conv(4, 5, 8, 6, (3, 3), (1, 1), (2, 2, 2, 2), input_dilation=(2, 2)),
}


def operands(shape):
    rng = np.random.default_rng(1)
    x = random_codes(rng, (shape.batch, shape.height, shape.width, shape.channels), shape.activation.name)
    channels = shape.channels // shape.groups
    return x, random_codes(rng, (shape.out_channels, *shape.kernel, channels), shape.weight.name)


def kernel_of(emit, x, weights, columns, rows):
    """A kernel that writes float32 sums ``(rows, columns)``."""

    def body(codes, packed, result) -> None:
        def write(value, row, column, _valid) -> None:
            store(result, row * columns + column, value.astype("float32"), 1)

        emit(codes, packed, write)

    specs = [TensorSpec(x.shape, "uint8"), TensorSpec(weights.shape, "uint8")]
    return build_prim_func("main", [*specs, TensorSpec((rows, columns), "float32")], body)


def conv_kernel(shape):
    """(function, x, packed weights, expected sums)"""
    x, codes = operands(shape)
    plan = plan_conv(shape, codes)
    assert plan is not None
    packed = pack_weights(codes, plan.depth)
    if isinstance(plan, IntegerPlan):
        packed = as_integers(packed)
    function = kernel_of(lambda *a: emit_conv(plan, *a), x, packed, shape.out_channels, plan.rows)
    return function, x, packed, reference.conv2d(x, codes, shape).reshape(plan.rows, -1)


def gemv_kernel(rows, columns, depth, activation, fragments=None):
    layouts = get_layout(activation), get_layout("E2M5")
    rng = np.random.default_rng(2)
    x, codes = random_codes(rng, (rows, depth), activation), random_codes(rng, (columns, depth), "E2M5")
    plan = plan_gemv(GemmShape(rows, columns, depth, *layouts), codes)
    assert plan is not None
    if fragments is not None:
        plan = replace(plan, fragments=fragments)
    packed = pack_gemv_weights(codes, plan.depth)
    function = kernel_of(lambda *a: emit_gemv(plan, *a), x, packed, columns, rows)
    return function, x, packed, reference.matmul(x, codes, *layouts)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_code_is_a_float16_number(name):
    """Every code, at every place of a word."""
    layout = get_layout(name)
    codes = np.arange(256, dtype=np.uint32)
    words = codes | (255 - codes) << 8 | (codes ^ 0x55) << 16 | (codes * 7 & 255) << 24
    function = build_prim_func(
        "main",
        [TensorSpec((256,), "uint32"), TensorSpec((512,), "uint32")],
        lambda x, y: _decode_all(x, y, layout),
    )
    found = np.zeros(512, np.uint32)
    tvm.compile(tvm.IRModule({"main": function}), target="llvm")["main"](
        *(parts := [tvm.runtime.tensor(a) for a in (words, found)])
    )
    halves = parts[1].numpy().view(np.float16).reshape(2, 256, 2).astype(np.float64)
    for place, value in enumerate((halves[0, :, 0], halves[1, :, 0], halves[0, :, 1], halves[1, :, 1])):
        grid = tvm_qfp8.format.decode_grid((words >> 8 * place & 255).astype(np.uint8), layout)
        np.testing.assert_array_equal(value * 2.0 ** grid_exponent(layout), np.nan_to_num(grid))


def _decode_all(x, y, layout) -> None:
    from tvm.tirx.script.builder import ir as T

    with T.serial(0, 256) as i:
        for place, pair in enumerate(decode_pairs(T.bind(x[i]), layout)):
            store(y, place * 256 + i, pair, 1)


def test_sums_stay_exact():
    weights = np.full((1, 256), 0x7F, np.uint8)  # 252
    steps = exact_steps(weights, get_layout("E2M5"), get_layout("UE3M5"), 16)
    assert steps * 16 * 252 * 4032 < EXACT <= (steps + 1) * 16 * 252 * 4032
    assert exact_steps(weights, get_layout("E2M5"), get_layout("UE3M5"), 32) == 0
    assert exact_steps(np.zeros((3, 64), np.uint8), get_layout("E2M5"), get_layout("E3M4"), 32) == 2


@NEEDS_COMPILER
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if "x3" in n else pytest.mark.slow) for n in CONVOLUTIONS]
)
def test_convolution_on_tensor_cores(name, tmp_path):
    function, x, packed, expected = conv_kernel(CONVOLUTIONS[name])
    found = np.zeros(expected.shape, np.float32)
    run_kernel(function, [x, packed, found], tmp_path)
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@NEEDS_COMPILER
@pytest.mark.parametrize(
    "case",
    [
        (1, 40, 1024, "UE2M6"),
        (3, 21, 400, "E3M4"),
        (8, 16, 48, "E2M5"),
        (8, 16, 4096, "E2M5"),
        (21, 24, 96, "E2M5"),
        (37, 40, 400, "UE3M5", 4),
        (30, 16, 1040, "E1M6", 2),
    ],
    ids=str,
)
def test_few_rows(case, tmp_path):
    function, x, packed, expected = gemv_kernel(*case)
    found = np.zeros(expected.shape, np.float32)
    run_kernel(function, [x, packed, found], tmp_path)
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_which_dense_layers_are_shared_by_warps():
    """Those for which other kernels have too few tiles; weights are decoded for as many rows as keep a GPU busy."""
    codes = {depth: random_codes(np.random.default_rng(0), (384, depth), "E2M5") for depth in (384, 1536)}

    def fragments(rows, depth):
        plan = plan_gemv(GemmShape(rows, 384, depth, *[get_layout("E2M5")] * 2), codes[depth])
        return None if plan is None else plan.fragments

    assert [fragments(rows, 384) for rows in (1, 8, 64, 128, 1024, 1025)] == [1, 1, 2, 4, None, None]
    assert fragments(128, 1536) == 2  # four would not fit into shared memory


@NEEDS_COMPILER
@pytest.mark.parametrize("name", DIRECT)
def test_direct_convolution(name, tmp_path):
    shape = DIRECT[name]
    x, codes = operands(shape)
    assert plan_conv(shape, codes) is None
    rows = shape.out_height * shape.out_width
    packed = pack_direct_weights(codes)
    function = kernel_of(lambda *a: emit_direct_conv(shape, *a), x, packed, shape.out_channels, rows)
    found = np.zeros((rows, shape.out_channels), np.float32)
    run_kernel(function, [x, packed, found], tmp_path)
    expected = reference.conv2d(x, codes, shape).reshape(rows, -1)
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@NEEDS_NVCC
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_compile_to_assembly_and_machine_code(arch):
    shape = conv(1, 4096, 4096, 4096)
    specs = np.empty((4096, 4096), np.uint8)
    dense = kernel_of(lambda *a: emit_conv(ConvPlan(shape, 512), *a), specs, specs, 4096, 4096)
    shape_of_one = GemmShape(1, 4096, 4096, *shape.layouts())
    vector = kernel_of(
        lambda *a: emit_gemv(GemvPlan(shape_of_one, 8, 8, True), *a), specs[:1], specs, 4096, 1
    )
    whole = conv(1, 4096, 4096, 4096, activation="E1M6", weight="E1M6")
    integers = kernel_of(lambda *a: emit_conv(IntegerPlan(whole, 0), *a), specs, specs, 4096, 4096)
    for function, product in (
        (dense, "m16n8k16"),
        (vector, "m16n8k16"),
        (integers, "m16n8k32.row.col.s32.s8.s8"),
    ):
        source = cuda_source(function)
        assembly = cuda_code.compile_cuda(source, arch, "ptx").decode()
        assert f".target {arch}" in assembly and f"mma.sync.aligned.{product}" in assembly
        # Epilogues round each operation; only the moves between float32 and int32 of sums have no product to fuse.
        assert "fma.rn.f32" not in assembly
        assert cuda_code.compile_cuda(source, arch, "cubin")[:4] == b"\x7fELF"


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_on_a_gpu(name):
    """Sums are exact, so the twin's bits are asked for."""
    function, x, packed, expected = conv_kernel(CONVOLUTIONS[name])
    np.testing.assert_array_equal(on_gpu(function, x, packed, expected.shape), expected.astype(np.float32))


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize(
    "case",
    [
        (1, 4096, 4096, "E3M4"),
        (8, 1000, 1024, "UE2M6"),
        (8, 256, 4096, "E2M5"),
        (100, 384, 1200, "UE3M5", 4),
        (64, 384, 1536, "E1M6", 2),
        (49, 960, 160, "E2M5"),
    ],
    ids=str,
)
def test_few_rows_on_a_gpu(case):
    function, x, packed, expected = gemv_kernel(*case)
    np.testing.assert_array_equal(on_gpu(function, x, packed, expected.shape), expected.astype(np.float32))


def gpu_target():
    """The GPU of this machine."""
    return "cuda -arch=sm_" + tvm.cuda(0).compute_version.replace(".", "")


def on_gpu(function, x, packed, shape):
    """What a kernel of ``kernel_of`` writes."""
    target = parse_target(gpu_target())
    cuda_code.register_compiler(target)
    arrays = [tvm.runtime.tensor(a, tvm.cuda(0)) for a in (x, packed, np.zeros(shape, np.float32))]
    tvm.compile(tvm.IRModule({"main": function}), target=target)["main"](*arrays)
    return arrays[-1].numpy()
