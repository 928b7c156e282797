"""Tables: the proved bound over the whole float32 range, and kernels bit-equal with the NumPy twin."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import tvm
from assembly import fused_multiply_adds
from quantized_programs import TARGETS, machine_runs
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.errors import TableError
from tvm_qfp8.tables import FUNCTIONS, build_table
from tvm_qfp8.tables.families import find_function
from tvm_qfp8.tables.observe import errors, sample_inputs
from tvm_qfp8.tables.softmax import build_softmax_exp
from tvm_qfp8.targets import isa as isa_of
from tvm_qfp8.targets import parse_target
from tvm_qfp8.topi.interpolate import emit_table
from tvm_qfp8.topi.isa import instruction_set
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, load, store

NAMES = [*FUNCTIONS, "elu(0.5)", "celu(1.3)", "pow(1.7)", "pow(-0.3)", "pow(3)", "pow(-2)", "pow(2.5)"]
MAX_ERRORS = (1e-2, 1e-3, 1e-4)
NAN_PATTERNS = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFF812345], np.uint32).view(
    np.float32
)


@pytest.fixture(scope="module")
def inputs() -> np.ndarray:
    """A million float32 values: every kind of number, denormals, infinities; no NaN."""
    return sample_inputs(1_000_000)


def _equal_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """The same bits; any NaN equals any NaN."""
    return bool(((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all())


@pytest.mark.parametrize("name", NAMES)
def test_error_is_within_the_proved_bound(name, inputs):
    with np.errstate(all="ignore"):
        expected = find_function(name).reference(inputs.astype(np.float64))
    for max_error in MAX_ERRORS:
        table = build_table(name, max_error=max_error)
        assert table.max_error <= max_error
        observed = errors(table(inputs), expected, table.relative).max()
        assert observed <= table.max_error
        assert table.observed_error <= table.max_error


TEXTBOOK = {
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "softplus": lambda x: math.log1p(math.exp(x)),
    "tanh": math.tanh,
    "erf": math.erf,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "elu": lambda x: x if x > 0 else math.expm1(x),
    "elu(0.5)": lambda x: x if x > 0 else 0.5 * math.expm1(x),
    "celu": lambda x: x if x > 0 else math.expm1(x),
    "celu(1.3)": lambda x: x if x > 0 else 1.3 * math.expm1(x / 1.3),
    "selu": lambda x: 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * math.expm1(x)),
    "sin": math.sin,
    "cos": math.cos,
    "pow(1.7)": lambda x: abs(x) ** 1.7,
    "pow(-0.3)": lambda x: abs(x) ** -0.3,
    "pow(3)": lambda x: x**3,
    "pow(-2)": lambda x: x**-2.0,
    "pow(2.5)": lambda x: abs(x) ** 2.5,
    "exp": math.exp,
    "exp2": lambda x: 2.0**x,
    "log": lambda x: math.log(abs(x) + 1e-3),
    "reciprocal": lambda x: 1 / x,
    "rsqrt": lambda x: abs(x) ** -0.5,
    "sqrt": lambda x: math.sqrt(abs(x)),
    "hardsigmoid": lambda x: min(max(x / 6 + 0.5, 0), 1),
    "hardswish": lambda x: x * min(max(x / 6 + 0.5, 0), 1),
}


@pytest.mark.parametrize("name", NAMES)
def test_references_are_the_textbook_functions(name):
    x = np.linspace(-20, 20, 400)
    argument = {"log": np.abs(x) + 1e-3, "rsqrt": np.abs(x), "sqrt": np.abs(x)}.get(name, x)
    if name in ("pow(1.7)", "pow(-0.3)", "pow(2.5)"):
        argument = np.abs(x)
    expected = [TEXTBOOK[name](value) for value in x.tolist()]
    np.testing.assert_allclose(find_function(name).reference(argument), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if find_function(name).core])
def test_curvature_is_a_bound(name):
    function = find_function(name)
    low = -40.0 if function.low is None else function.low
    high = 40.0 if function.high is None else function.high
    x, gap = np.linspace(low, high, 400_001, retstep=True)
    second = np.abs(np.diff(function.core(x), 2)) / gap**2
    assert second.max() <= function.curvature + 1e-4


LIMITS = {
    "gelu": (0.0, np.inf),
    "gelu_tanh": (0.0, np.inf),
    "silu": (0.0, np.inf),
    "mish": (0.0, np.inf),
    "softplus": (0.0, np.inf),
    "hardswish": (0.0, np.inf),
    "elu": (-1.0, np.inf),
    "elu(0.5)": (-0.5, np.inf),
    "celu": (-1.0, np.inf),
    "celu(1.3)": (np.float32(-1.3), np.inf),
    "selu": (np.float32(-1.0507009873554805 * 1.6732632423543772), np.inf),
    "sin": (np.nan, np.nan),
    "cos": (np.nan, np.nan),
    "pow(1.7)": (np.nan, np.inf),
    "pow(-0.3)": (np.nan, 0.0),
    "pow(3)": (-np.inf, np.inf),
    "pow(-2)": (0.0, 0.0),
    "pow(2.5)": (np.nan, np.inf),
    "tanh": (-1.0, 1.0),
    "erf": (-1.0, 1.0),
    "sigmoid": (0.0, 1.0),
    "hardsigmoid": (0.0, 1.0),
    "exp": (0.0, np.inf),
    "exp2": (0.0, np.inf),
    "log": (np.nan, np.inf),
    "reciprocal": (0.0, 0.0),
    "rsqrt": (np.nan, 0.0),
    "sqrt": (np.nan, np.inf),
}
ZEROS = [
    "gelu",
    "gelu_tanh",
    "silu",
    "mish",
    "elu",
    "tanh",
    "erf",
    "hardswish",
    "sqrt",
    "selu",
    "celu(1.3)",
    "elu(0.5)",
    "sin",
    "pow(3)",
    "pow(1.7)",
]


@pytest.mark.parametrize("max_error", [1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("name", NAMES)
def test_special_values(name, max_error):
    if name in ("pow(1.7)", "pow(-0.3)"):
        max_error = max(max_error, 1e-4)
    table = build_table(name, max_error=max_error)
    np.testing.assert_array_equal(table([-np.inf, np.inf]), LIMITS[name])
    assert np.isnan(table(NAN_PATTERNS)).all()
    if name in ZEROS:
        np.testing.assert_array_equal(table([0.0, -0.0]), [0.0, 0.0])
    if name in ("exp", "exp2", "cos"):
        assert table(0.0) == 1.0
    if name == "log":
        np.testing.assert_array_equal(table([1.0, 0.0, -0.0, -1e-45]), [0.0, -np.inf, -np.inf, np.nan])


def test_smaller_errors_down_to_float32():
    assert build_table("gelu", max_error=1e-6).max_error <= 1e-6
    assert build_table("exp", max_error=1e-6).reduction == "exp_split"


def test_callable():
    table = build_table(np.sin, max_error=1e-4, domain=(-3.0, 3.0))
    x = np.linspace(-3, 3, 10_001, dtype=np.float32)
    assert np.abs(table(x) - np.sin(x.astype(np.float64))).max() <= table.max_error <= 1e-4
    np.testing.assert_array_equal(table([-9.0, 9.0]), table([-3.0, 3.0]))


def test_callable_with_an_offset_and_relative_error():
    table = build_table(lambda x: x**1.7, max_error=1e-4, domain=(1.0, 9.0), relative=True)
    x = np.linspace(1, 9, 10_001, dtype=np.float32)
    exact = x.astype(np.float64) ** 1.7
    assert (np.abs(table(x) - exact) / exact).max() <= table.max_error <= 1e-4
    assert table.offset != 0.0


def test_callable_with_a_kink():
    table = build_table(lambda x: np.maximum(x - 0.3, 0.0), max_error=0.05, domain=(-1.0, 2.0))
    x = np.linspace(-1, 2, 10_001, dtype=np.float32)
    assert np.abs(table(x) - np.maximum(x - np.float64(0.3), 0)).max() <= table.max_error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(function="nosuch"), "unknown"),
        (dict(function="gelu", max_error=1e-9), "1e-07"),
        (dict(function="gelu", max_error=float("nan")), "max_error is nan"),
        (dict(function=np.sin), "needs domain"),
        (dict(function=np.sin, domain=(2.0, 1.0)), "low < high"),
        (dict(function="reciprocal", domain=(-1.0, 1.0)), "not finite at 0"),
        (dict(function=np.sin, domain=(-1.0, 1.0), relative=True), "has a zero"),
        (dict(function=np.sign, domain=(-1.0, 1.0)), "no table"),
        (dict(function="mish", max_error=2e-7), "ask for more error"),
    ],
)
def test_impossible_requests(arguments, message):
    with pytest.raises(TableError, match=message):
        build_table(**arguments)


def _kernels(tables, count: int, isa, lanes: int) -> tvm.IRModule:
    """One function a table, applied to ``count`` values by vectors of ``lanes``."""

    def body_of(table):
        def body(source, target) -> None:
            with T.serial(0, count // lanes) as i:
                store(target, i * lanes, emit_table(table, load(source, i * lanes, lanes), isa), lanes)

        return body

    specs = [TensorSpec((count,), "float32")] * 2
    return tvm.IRModule(
        {name: build_prim_func(name, specs, body_of(table)) for name, table in tables.items()}
    )


def _kernel_inputs(count: int) -> np.ndarray:
    x = np.concatenate([np.tile(NAN_PATTERNS, 7), sample_inputs(count - 100)])
    return np.resize(x, count)


def _wave(x):
    return np.sin(2 * np.pi * x / 0.7) + 0.3 * np.cos(4 * np.pi * x / 0.7)


def _all_tables() -> dict:
    tables = {
        f"{re.sub(r'[^a-z]', '_', name)}_{len(name)}_{i}": build_table(name, e)
        for name in NAMES
        for i, e in enumerate((1e-3, 1e-4))
    }
    tables["exp_normal"] = build_table("exp", 1e-3, domain=(-87.0, 0.0))
    tables["exp_split"] = build_table("exp", 1e-6)
    tables["softmax_square"] = build_softmax_exp(1.99e-3)
    tables["softmax"] = build_softmax_exp(1e-4)
    tables["monotone"] = build_table("gelu", 1e-4, monotone=True, exact_at=(1.0,))
    tables["rectifier"] = build_table(
        lambda x: 0.5 * (x + np.sqrt(x * x + 1.0)), 1e-3, domain=(-5.0, 5.0), symmetry="rectifier"
    )
    tables["continuous"] = build_table("tanh", 1e-3, continuous=True)
    tables["symmetric"] = build_table(lambda x: 1 / (1 + x * x), 1e-4, domain=(-5.0, 5.0), symmetry="even")
    tables["periodic"] = build_table(_wave, 1e-4, domain=(-300.0, 400.0), period=0.7)
    tables["power"] = build_table(lambda x: x**1.7, 1e-4, domain=(1.0, 9.0))
    return tables


def _text(module) -> str:
    return module.mod.inspect_source("asm")


@pytest.mark.parametrize("name", list(TARGETS))
def test_kernels_equal_the_numpy_twin(name):
    if not machine_runs(name):
        pytest.skip(f"this CPU does not run {name}")
    target = parse_target(TARGETS[name])
    isa = instruction_set(isa_of(target))
    x, tables = _kernel_inputs(1 << 16), _all_tables()
    module = tvm.compile(_kernels(tables, x.size, isa, isa.lanes), target=target)
    assert not fused_multiply_adds(_text(module))
    out = tvm.runtime.tensor(np.zeros_like(x))
    for function, table in tables.items():
        module.mod[function](tvm.runtime.tensor(x), out)
        # Softmax has subtracted the greatest value: its exponential is made for what is left.
        inside = x <= 0 if table.reduction in ("exp_flush", "exp_square") else slice(None)
        assert _equal_bits(out.numpy()[inside], table(x)[inside]), function


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16])
def test_any_number_of_lanes(lanes):
    target = parse_target("native")
    isa = instruction_set(isa_of(target))
    x = _kernel_inputs(1 << 12)
    tables = {"gelu": build_table("gelu"), "mish": build_table("mish", 1e-4), "exp": build_table("exp")}
    module = tvm.compile(_kernels(tables, x.size, isa, lanes), target=target)
    out = tvm.runtime.tensor(np.zeros_like(x))
    for function, table in tables.items():
        module.mod[function](tvm.runtime.tensor(x), out)
        assert _equal_bits(out.numpy(), table(x)), function


def test_aarch64_code_looks_up_registers_and_rounds_each_step():
    isa = instruction_set("neon")
    tables = {"gelu": build_table("gelu"), "silu": build_table("silu", 1e-5)}
    text = _text(tvm.compile(_kernels(tables, 64, isa, isa.lanes), target=parse_target("aarch64")))
    assert "tbl" in text
    assert not fused_multiply_adds(text)


@pytest.mark.aarch64
def test_aarch64_equals_the_numpy_twin(run_aarch64):
    isa = instruction_set("neon")
    x, tables = _kernel_inputs(1 << 13), _all_tables()
    module = tvm.compile(_kernels(tables, x.size, isa, isa.lanes), target=parse_target("aarch64"))
    for function, table in tables.items():
        (y,) = run_aarch64(module, [x], function=function, outputs=[(x.shape, "float32")])
        assert _equal_bits(y, table(x)), function


def test_infinity_is_near_the_largest_float32():
    just_below = np.array([float(np.finfo(np.float32).max) * (1 + 1e-8)])
    for relative in (False, True):
        assert errors(np.array([np.inf], np.float32), just_below, relative)[0] < 1e-7
