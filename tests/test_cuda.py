"""CUDA kernels: run by an emulator of the language on a CPU, compiled by nvcc, and, with a GPU, on it."""

import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import tvm
import tvm_ffi
from cuda_emulator import cuda_source, run_kernel, run_program
from test_bundle import model, samples

import tvm_qfp8
from tvm_qfp8 import cuda_code
from tvm_qfp8.errors import ModelError, TargetError
from tvm_qfp8.format import get_layout
from tvm_qfp8.targets import host_of, parse_target
from tvm_qfp8.topi import reference
from tvm_qfp8.topi.conv2d import ConvShape
from tvm_qfp8.topi.cuda.conv_plan import ConvPlan, IntegerPlan, as_integers, pack_weights, plan_conv
from tvm_qfp8.topi.cuda.device import decode_pairs, grid_exponent
from tvm_qfp8.topi.cuda.direct_conv import emit_direct_conv, pack_direct_weights
from tvm_qfp8.topi.cuda.exact_blocks import EXACT, exact_steps
from tvm_qfp8.topi.cuda.gemm import emit_conv
from tvm_qfp8.topi.cuda.gemv import GemvPlan, emit_gemv, plan_gemv
from tvm_qfp8.topi.cuda.gemv import pack_weights as pack_gemv_weights
from tvm_qfp8.topi.gemm import GemmShape
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, load, store

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
NEEDS_NVCC = pytest.mark.skipif(cuda_code.find_nvcc() is None, reason="nvcc is not installed")
NEEDS_GPU = pytest.mark.skipif(not tvm.runtime.enabled("cuda"), reason="this machine has no NVIDIA GPU")
FATBIN = b"\x50\xed\x55\xba"
"""What a fat binary starts with."""
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


@pytest.fixture(scope="module")
def compiled():
    return tvm_qfp8.compile(model(), "cuda-sm80", calibration=samples())


@pytest.mark.slow
@NEEDS_COMPILER
def test_a_whole_network_gives_the_bits_of_the_cpu(tmp_path):
    x = samples()[2]["x"]
    here = tvm_qfp8.compile(model(), "native", calibration=samples())
    found = run_program(lowered_for_cuda(model(), samples()), [x], tmp_path)
    for ours, theirs in zip(found, here.run({"x": x}), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def attention() -> onnx.ModelProto:
    """Tokens -> embedding -> LayerNorm -> attention of one head -> GELU -> length 1, with products of activations."""
    rng = np.random.default_rng(3)
    shapes = {"table": (9, 16), **dict.fromkeys("qkvo", (16, 16))}
    weights = {name: rng.standard_normal(shape, np.float32) * 0.5 for name, shape in shapes.items()}
    weights |= {"one": np.ones(16, np.float32), "zero": np.full(16, 0.25, np.float32)}
    body = """
        embedded = Gather (table, tokens)
        normed = LayerNormalization <axis = -1> (embedded, one, zero)
        queries = MatMul (normed, q)
        keys = MatMul (normed, k)
        values = MatMul (normed, v)
        turned = Transpose <perm = [0, 2, 1]> (keys)
        scores = MatMul (queries, turned)
        shares = Softmax (scores)
        mixed = MatMul (shares, values)
        hidden = MatMul (mixed, o)
        active = Gelu (hidden)
        unit = LpNormalization <axis = -1, p = 2> (active)
        y = Add (unit, embedded)
    """
    text = f"agraph (int64[2, 5] tokens) => (float[2, 5, 16] y) {{ {body} }}"
    graph = onnx.parser.parse_graph(text)
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)


def lowered_for_cuda(network, calibration, config=None) -> tvm.IRModule:
    """What ``compile`` hands to TVM."""
    found, tvm_compile = [], tvm.compile

    def keep(mod, target, **options):
        # The calibration has kernels of its own, for this machine.
        return found.append(mod) if target.kind.name == "cuda" else tvm_compile(mod, target=target, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tvm.compile", keep)
        tvm_qfp8.compile(network, "cuda-sm80", calibration=calibration, config=config)
    return found[0]


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize(
    "calibrated, activations", [(True, "auto"), (False, "auto"), (False, "E1M6"), (False, "float32")]
)
def test_attention_gives_the_bits_of_the_cpu(calibrated, activations, tmp_path):
    """Calibrated, with scales for rows found at run time, and with float32 activations."""
    inputs = [{"tokens": np.random.default_rng(i).integers(0, 9, (2, 5))} for i in range(4)]
    calibration = inputs if calibrated else None
    config = tvm_qfp8.Config(activations=activations)
    lowered = lowered_for_cuda(attention(), calibration, config)
    here = tvm_qfp8.compile(attention(), "native", calibration=calibration, config=config)
    (found,) = run_program(lowered, [inputs[0]["tokens"]], tmp_path)
    np.testing.assert_array_equal(found, here.run(inputs[0])[0])


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
    for function in (dense, vector):
        source = cuda_source(function)
        assembly = cuda_code.compile_cuda(source, arch, "ptx").decode()
        assert f".target {arch}" in assembly and "mma.sync.aligned.m16n8k16" in assembly
        # Epilogues round each operation; only the moves between float32 and int32 of sums have no product to fuse.
        assert "fma.rn.f32" not in assembly
        assert cuda_code.compile_cuda(source, arch, "cubin")[:4] == b"\x7fELF"


@NEEDS_NVCC
def test_an_exported_module_holds_compiled_code(compiled, tmp_path):
    module = compiled
    source = cuda_code.cuda_source(module._executable)
    assert source.count("__global__") >= 4
    module.export_library(tmp_path / "m.so")
    data = (tmp_path / "m.so").read_bytes()
    assert FATBIN in data and b"__global__" not in data
    if not tvm.runtime.enabled("cuda"):
        with pytest.raises(ModelError, match="NVIDIA GPU, whose driver this machine lacks"):
            tvm_qfp8.load(tmp_path / "m.so")
        with pytest.raises(ModelError, match="this machine has no cuda"):
            module.run(samples()[0])
    with pytest.raises(ModelError, match="bundles are for CPUs"):
        tvm_qfp8.bundle(tmp_path / "m.so", tmp_path / "b")


@pytest.mark.slow
@NEEDS_NVCC
@pytest.mark.skipif(tvm.runtime.enabled("cuda"), reason="the real loader reads it in the tests marked gpu")
def test_what_a_loader_is_given(compiled, tmp_path):
    """Format, functions with their launch parameters, and code, each whole, and all that follows in the file."""
    compiled.export_library(tmp_path / "m.so")
    given = []
    empty = build_prim_func("f", [TensorSpec((1,), "uint8")], lambda x: store(x, 0, load(x, 0, 1), 1))
    stand_in = tvm.compile(tvm.IRModule({"f": empty}), target="llvm").mod

    def read(data: bytes):
        given.append(data)
        return stand_in

    graphs = [f"vm.builtin.cuda_graph.{name}" for name in ("run_or_capture", "get_cached_alloc")]
    functions = {"ffi.Module.load_from_bytes.cuda": read, **dict.fromkeys(graphs, lambda *_: None)}
    for name, function in functions.items():
        tvm_ffi.register_global_func(name, function)
    try:
        loaded = tvm_qfp8.load(tmp_path / "m.so")
    finally:
        for name in functions:
            tvm_ffi.registry.remove_global_func(name)
    assert [info.name for info in loaded.outputs] == ["y", "z"]
    (data,) = given
    assert data.startswith(b"\x06\0\0\0\0\0\0\0fatbin") and b"blockIdx.x" in data
    at = data.index(FATBIN)
    assert int.from_bytes(data[at - 8 : at], "little") == len(data) - at


@NEEDS_NVCC
def test_what_nvcc_refuses_is_shown():
    with pytest.raises(TargetError, match=r"compiling kernels failed: .*nvcc.*\n.*error"):
        cuda_code.compile_cuda("__global__ void f() { undeclared(); }", "sm_80")


def test_a_missing_nvcc_is_named(monkeypatch):
    monkeypatch.setattr(cuda_code, "find_nvcc", lambda: None)
    with pytest.raises(TargetError, match="no nvcc on PATH"):
        cuda_code.compile_cuda("", "sm_80")


def test_targets_have_a_host_and_new_enough_tensor_cores():
    assert host_of(parse_target("cuda-sm90")).kind.name == "llvm"
    assert str(host_of(parse_target("jetson-orin")).attrs["mcpu"]) == "cortex-a78ae"
    with pytest.raises(TargetError, match="sm_80 or newer"):
        parse_target("cuda -arch=sm_75")


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


@pytest.mark.gpu
@NEEDS_GPU
def test_a_whole_network_on_a_gpu():
    module = tvm_qfp8.compile(model(), gpu_target(), calibration=samples())
    here = tvm_qfp8.compile(model(), "native", calibration=samples())
    for ours, theirs in zip(module.run(samples()[2]), here.run(samples()[2]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("calibrated", [True, False])
def test_attention_on_a_gpu(calibrated, tmp_path):
    """The exported file, loaded again."""
    inputs = [{"tokens": np.random.default_rng(i).integers(0, 9, (2, 5))} for i in range(4)]
    calibration = inputs if calibrated else None
    tvm_qfp8.compile(attention(), gpu_target(), calibration=calibration).export_library(tmp_path / "m.so")
    here = tvm_qfp8.compile(attention(), "native", calibration=calibration)
    np.testing.assert_array_equal(tvm_qfp8.load(tmp_path / "m.so").run(inputs[0])[0], here.run(inputs[0])[0])


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
