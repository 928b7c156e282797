"""Whole networks for GPUs: run by the emulator, exported, loaded, and, with a GPU, run on it."""

import platform

import numpy as np
import onnx
import pytest
import tvm
import tvm_ffi
from cuda_emulator import run_program
from test_bundle import model, samples
from test_cuda import NEEDS_COMPILER, NEEDS_GPU, NEEDS_NVCC, gpu_target

import tvm_qfp8
from tvm_qfp8 import cuda_code
from tvm_qfp8.errors import ModelError, TargetError
from tvm_qfp8.profiling import profile
from tvm_qfp8.targets import host_of, parse_target
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, load, store

FATBIN = b"\x50\xed\x55\xba"
"""What a fat binary starts with."""


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


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize("groups", [2, 4, 20])
def test_groups_of_channels_give_the_bits_of_the_cpu(groups, tmp_path):
    rng = np.random.default_rng(5)
    shapes = {"first": (20, 3, 3, 3), "last": (4, 20, 1, 1), "scale": (20,), "shift": (20,)}
    text = f"""agraph (float[2, 3, 7, 6] x) => (float[2, 4, 5, 4] y) {{
        c = Conv (x, first)
        n = GroupNormalization <num_groups = {groups}> (c, scale, shift)
        r = Relu (n)
        y = Conv (r, last)
    }}"""
    graph = onnx.parser.parse_graph(text)
    for name, shape in shapes.items():
        graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape, np.float32), name))
    network = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    calibration = [{"x": rng.standard_normal((2, 3, 7, 6), np.float32)} for _ in range(2)]
    here = tvm_qfp8.compile(network, "native", calibration=calibration)
    lowered = lowered_for_cuda(network, calibration)
    assert any(var.name_hint.startswith("group_norm") for var in lowered.get_global_vars())
    found = run_program(lowered, [calibration[0]["x"]], tmp_path)
    np.testing.assert_array_equal(found[0], here.run(calibration[0])[0])


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


def dense_and_residual() -> onnx.ModelProto:
    """A residual block, whose sum becomes float16, and a concatenation with BatchNorm behind it."""
    rng = np.random.default_rng(5)
    weights = {
        "stem": rng.standard_normal((8, 3, 3, 3), np.float32) * 0.3,
        "inner": rng.standard_normal((8, 8, 3, 3), np.float32) * 0.2,
        "last": rng.standard_normal((4, 16, 1, 1), np.float32) * 0.3,
        **{name: rng.random(16, np.float32) + 0.5 for name in ("gamma", "beta", "mean", "variance")},
    }
    body = """
        a = Conv <pads = [1, 1, 1, 1]> (x, stem)
        b = Relu (a)
        c = Conv <pads = [1, 1, 1, 1]> (b, inner)
        d = Add (c, b)
        e = Conv <pads = [1, 1, 1, 1]> (d, inner)
        f = Concat <axis = 1> (d, e)
        g = BatchNormalization (f, gamma, beta, mean, variance)
        h = Relu (g)
        i = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (h)
        j = Conv (i, last)
        k = GlobalMaxPool (j)
        y = Mul (j, k)
    """
    graph = onnx.parser.parse_graph(f"agraph (float[1, 3, 10, 10] x) => (float[1, 4, 5, 5] y) {{ {body} }}")
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize(
    "kept", ["results rounded to float16", "results rounded to bfloat16", "sums kept as codes"]
)
def test_what_lies_between_kernels_has_the_bits_of_the_cpu(tmp_path, kept, monkeypatch):
    monkeypatch.setattr("tvm_qfp8.calibration.sums.LEAST_SIZE", 1 if "codes" in kept else 2**17)
    inputs = [{"x": np.random.default_rng(i).standard_normal((1, 3, 10, 10), np.float32)} for i in range(4)]
    calibration = None if "bfloat16" in kept else inputs
    here = tvm_qfp8.compile(dense_and_residual(), "native", calibration=calibration)
    assert kept in here.report.totals
    lowered = lowered_for_cuda(dense_and_residual(), calibration)
    (found,) = run_program(lowered, [inputs[0]["x"]], tmp_path)
    np.testing.assert_array_equal(found, here.run(inputs[0])[0])


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
    with pytest.raises(ModelError, match="modules on CPUs: a GPU runs them as one graph.*nsys profile"):
        profile(module, samples()[0])


@NEEDS_NVCC
def test_a_host_without_its_features_is_told_what_to_compile(compiled, monkeypatch):
    monkeypatch.setitem(compiled.cpu, "architecture", platform.machine())
    monkeypatch.setattr("tvm_qfp8.cpu_features.missing_features", lambda _: ["nosuch"])
    with pytest.raises(ModelError, match="uses nosuch, which this CPU does not have; .*--target cuda-sm80"):
        compiled.check_cpu()


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
