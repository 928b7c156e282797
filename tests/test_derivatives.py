"""Tables of derivatives and the kernels of training: bounds, and the bits of the NumPy twin."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm
from quantized_programs import TARGETS, machine_runs

from tvm_qfp8.errors import TableError
from tvm_qfp8.tables import build_table
from tvm_qfp8.tables.families import find_function
from tvm_qfp8.tables.observe import errors, sample_inputs
from tvm_qfp8.tables.softmax import build_softmax_exp
from tvm_qfp8.targets import cpu_features, isa, parse_target
from tvm_qfp8.topi.apply_table import ApplyTable
from tvm_qfp8.topi.isa import instruction_set
from tvm_qfp8.topi.softmax_rows import SoftmaxRows

NAMES = (
    "gelu",
    "gelu_tanh",
    "silu",
    "softplus",
    "tanh",
    "sigmoid",
    "mish",
    "elu",
    "elu(0.5)",
    "selu",
    "celu",
    "celu(1.3)",
    "hardsigmoid",
    "hardswish",
)
KINKS = (-3.0, 0.0, 3.0)
LENGTHS = (0, 1, 15, 16, 1000)


def _run(emit, target: str, arguments: list) -> np.ndarray:
    parsed = parse_target(target)
    kernel = emit(instruction_set(isa(parsed), cpu_features(parsed)))
    compiled = tvm.compile(tvm.IRModule({"main": kernel}), target=parsed)
    tensors = [tvm.runtime.tensor(a) if isinstance(a, np.ndarray) else a for a in arguments]
    compiled.mod["main"](*tensors)
    return [t.numpy() for t in tensors if not isinstance(t, int)][-1]


def _bfloat16(x: np.ndarray) -> np.ndarray:
    """The words of float32 numbers rounded to nearest even."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _from_bfloat16(words: np.ndarray) -> np.ndarray:
    return (words.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_derivative_is_within_the_proved_bound(name):
    x = sample_inputs(200_000)
    with np.errstate(all="ignore"):
        expected = find_function(name + "'").reference(x.astype(np.float64))
    for max_error in (1e-2, 1e-3, 1e-4):
        table = build_table(name + "'", max_error)
        assert table.max_error <= max_error
        assert errors(table(x), expected, False).max() <= table.max_error
        assert np.isnan(table(np.float32(np.nan)))


@pytest.mark.parametrize("name", NAMES)
def test_derivative_is_that_of_the_function(name):
    x = np.linspace(-8, 8, 3203)
    x = x[np.min(np.abs(x[:, None] - KINKS), axis=1) > 1e-3]
    function, step = find_function(name).reference, 1e-5
    differences = (function(x + step) - function(x - step)) / (2 * step)
    np.testing.assert_allclose(find_function(name + "'").reference(x), differences, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_stated_curvature_bounds_the_second_difference(name):
    function = find_function(name + "'")
    if function.core is None:
        return
    c = np.linspace(-20 if function.low is None else 0, 0 if function.high == 0.0 else 20, 200_001)
    second = np.diff(function.core(c), 2) / (c[1] - c[0]) ** 2
    assert np.abs(second).max() <= function.curvature * (1 + 1e-3)


def test_functions_without_a_derivative_are_refused():
    with pytest.raises(TableError, match="gelu'"):
        build_table("erf'")


@pytest.mark.parametrize(
    ("name", "target", "parallel"),
    [
        ("tanh'", "sse2", False),
        ("gelu'", "avx2", True),
        ("selu'", "avx512", False),
        ("hardswish'", "avx2", False),
    ],
)
def test_gradient_kernel_equals_its_twin(name, target, parallel):
    if not machine_runs(target):
        pytest.skip(f"this machine does not run {target}")
    table = build_table(name, 1e-3)
    random = np.random.default_rng(0)
    grad, x = (random.normal(0, 3, 20_001).astype(np.float32) for _ in range(2))
    x[:3] = np.nan, np.inf, -np.inf
    kernel = ApplyTable(table, True, "float32", parallel)
    found = _run(kernel.prim_func, TARGETS[target], [grad, x, np.zeros_like(x)])
    np.testing.assert_array_equal(found, grad * table(x))


@pytest.mark.parametrize("length", LENGTHS)
def test_any_length_and_bfloat16(length):
    table = build_table("silu", 1e-3)
    x = np.random.default_rng(1).normal(0, 3, length).astype(np.float32)
    plain = _run(ApplyTable(table, False, "float32", False).prim_func, "native", [x, np.zeros_like(x)])
    np.testing.assert_array_equal(plain, table(x))
    words = _bfloat16(x)
    rounded = _run(ApplyTable(table, False, "uint16", False).prim_func, "native", [words, 0 * words])
    np.testing.assert_array_equal(rounded, _bfloat16(table(_from_bfloat16(words))))


def test_bfloat16_keeps_nan_and_infinities():
    words = np.array([0x7FFF, 0xFFFF, 0x7F81, 0x7F80, 0xFF80], np.uint16)
    kernel = ApplyTable(build_table("softplus", 1e-3), False, "uint16", False)
    found = _from_bfloat16(_run(kernel.prim_func, "native", [words, 0 * words]))
    np.testing.assert_array_equal(found, np.array([np.nan, np.nan, np.nan, np.inf, 0.0], np.float32))


@pytest.mark.parametrize("target", ["avx2", "avx512"])
def test_softmax_of_any_length(target):
    if not machine_runs(target):
        pytest.skip(f"this machine does not run {target}")
    kernel = SoftmaxRows(build_softmax_exp(1e-3), False)
    for rows, length in ((3, 1), (4, 15), (2, 16), (3, 100)):
        x = np.random.default_rng(2).normal(0, 4, (rows, length)).astype(np.float32)
        x[0, 0] = -np.inf if length > 1 else x[0, 0]
        found = _run(kernel.prim_func, TARGETS[target], [x.reshape(-1), np.zeros(x.size, np.float32), length])
        e = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
        assert np.abs(found.reshape(x.shape) - e / e.sum(1, keepdims=True)).max() <= 5.1e-4


@pytest.mark.aarch64
@pytest.mark.parametrize("storage", ["float32", "uint16"])
def test_aarch64_gradient_kernel_equals_its_twin(run_aarch64, storage):
    table, random = build_table("mish'", 1e-3), np.random.default_rng(3)
    grad, x = (random.normal(0, 3, 1003).astype(np.float32) for _ in range(2))
    if storage == "uint16":
        grad, x = _bfloat16(grad), _bfloat16(x)
        expected = _bfloat16(_from_bfloat16(grad) * table(_from_bfloat16(x)))
    else:
        expected = grad * table(x)
    kernel = ApplyTable(table, True, storage, False).prim_func(instruction_set("neon"))
    module = tvm.compile(tvm.IRModule({"main": kernel}), target=parse_target("aarch64"))
    (found,) = run_aarch64(module, [grad, x], function="main", outputs=[(x.shape, storage)])
    np.testing.assert_array_equal(found, expected)


def test_kernels_hold_no_fused_multiply_add():
    target = parse_target("aarch64")
    kernel = ApplyTable(build_table("gelu'", 1e-3), True, "float32", False).prim_func(instruction_set("neon"))
    text = tvm.compile(tvm.IRModule({"main": kernel}), target=target).mod.inspect_source("asm")
    assert not re.search(r"\bf(n?m(add|sub)|ml[as])\b", text)
