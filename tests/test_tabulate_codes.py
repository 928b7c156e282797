"""Functions of tensors that are held as codes only: tables of 256 exact results, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from quantized_programs import TARGETS, machine_runs, program
from tvm import relax

import tvm_qfp8
from tvm_qfp8.format import encode, get_layout
from tvm_qfp8.relay_passes.tabulate_codes import TabulateCodes, code_chains
from tvm_qfp8.tables.families import find_function
from tvm_qfp8.targets import cpu_features, parse_target
from tvm_qfp8.targets import isa as isa_of
from tvm_qfp8.topi.code_lookup import look_up_prim_func
from tvm_qfp8.topi.isa import instruction_set

CODES = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8)
E3M4 = get_layout("E3M4")


def scaled_gelu(builder, codes):
    x = builder.emit(relax.op.astype(codes, "float32"))
    x = builder.emit(relax.op.multiply(x, relax.const(np.float32(0.02))))
    return builder.emit(relax.op.nn.gelu(x))


def exact(codes: np.ndarray, layout="E2M5") -> np.ndarray:
    x = get_layout(layout).grid.astype(np.float32)[codes] * np.float32(0.02)
    return find_function("gelu").reference(x.astype(np.float64)).astype(np.float32)


def test_float_result_is_exact():
    module = tvm_qfp8.compile(program([((10, 100), "E2M5")], scaled_gelu))
    assert [layer.became for layer in module.report.layers] == ["in a table of 256 codes, exact"]
    (got,) = module(CODES.reshape(10, 100))
    np.testing.assert_array_equal(got, exact(CODES).reshape(10, 100))


def test_codes_to_codes_after_moves():
    def emit(builder, a, b):
        joined = builder.emit(relax.op.concat([a, b], axis=1))
        x = scaled_gelu(builder, builder.emit(relax.op.reshape(joined, (2000,))))
        x = builder.emit(relax.op.divide(x, relax.const(np.float32(0.01))))
        return relax.op.astype(x, E3M4.ir_dtype)

    parts = CODES.reshape(10, 100), CODES[::-1].reshape(10, 100)
    quantized = program([((10, 100), "UE2M6"), ((10, 100), "UE2M6")], emit)
    module = tvm_qfp8.compile(quantized)
    joined = np.concatenate(parts, axis=1).reshape(-1)
    expected = encode(exact(joined, "UE2M6") / np.float32(0.01), 1.0, "E3M4")
    (got,) = module(*parts)
    np.testing.assert_array_equal(got, expected)


def test_only_the_result_is_looked_up():
    def emit(builder, codes):
        x = scaled_gelu(builder, codes)
        y = builder.emit(relax.op.sigmoid(x))
        return relax.op.add(builder.emit(relax.op.multiply(x, y)), x)

    quantized = program([((16,), "E3M4")], emit)
    names: list[str] = []
    relax.analysis.post_order_visit(
        TabulateCodes()(quantized)["main"],
        lambda e: names.append(e.op.name) if isinstance(e, relax.Call) else None,
    )
    assert names == ["relax.qfp8.look_up"]


def test_other_tensors_end_a_chain():
    def emit(builder, codes, other):
        return relax.op.add(scaled_gelu(builder, codes), other)

    quantized = program([((16,), "E3M4"), ((16,), None)], emit)
    assert max(chain.steps for chain in code_chains(quantized).values()) == 2
    (got,) = tvm_qfp8.compile(quantized)(CODES[:16], np.ones(16, np.float32))
    np.testing.assert_array_equal(got, exact(CODES[:16], "E3M4") + np.float32(1))


def kernel(target: str, size: int, dtype: str):
    parsed = parse_target(target)
    isa = instruction_set(isa_of(parsed), cpu_features(parsed))
    function = look_up_prim_func(isa, 2, (size,), dtype).with_attr("global_symbol", "main")
    return tvm.compile(tvm.IRModule({"main": function}), target=parsed)


@pytest.mark.parametrize("size", [1, 15, 64, 1000, 70_001])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("target", [*TARGETS.values(), "native"])
def test_every_form_reads_the_table(target, dtype, size):
    if not machine_runs({name: key for key, name in TARGETS.items()}.get(target, "sse2")):
        pytest.skip(f"this CPU does not run {target}")
    rng = np.random.default_rng(size)
    codes, table = rng.integers(0, 256, size, dtype=np.uint8), rng.permutation(256).astype(dtype)
    result = tvm.runtime.tensor(np.zeros(size, dtype))
    kernel(target, size, dtype)["main"](tvm.runtime.tensor(codes), tvm.runtime.tensor(table), result)
    np.testing.assert_array_equal(result.numpy(), table[codes])


@pytest.mark.aarch64
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_aarch64_reads_the_table(run_aarch64, dtype):
    table = np.random.default_rng(1).permutation(256).astype(dtype)
    module = kernel("aarch64", 1000, dtype)
    (got,) = run_aarch64(module, [CODES, table], function="main", outputs=[((1000,), dtype)])
    np.testing.assert_array_equal(got, table[CODES])
