"""Codec arithmetic of every instruction set against the NumPy twin, code by code and around every midpoint."""

import numpy as np
import pytest
import tvm
from quantized_programs import TARGETS, machine_runs

from tvm_qfp8.format import LAYOUTS, decode_grid, encode
from tvm_qfp8.targets import cpu_features, parse_target
from tvm_qfp8.targets import isa as isa_of
from tvm_qfp8.topi.codec import decode_expr, encode_expr
from tvm_qfp8.topi.isa import instruction_set
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, load, store, vector_runs

COMPUTED = sorted(name for name, layout in LAYOUTS.items() if layout.exponent_bits <= 3)
ALL_TARGETS = {**TARGETS, "native": "native"}


def apply(target: str, source: np.ndarray, dtype: str, lanes, expression) -> np.ndarray:
    """``expression(vector, isa)`` over ``source`` on the machine, in vectors of ``lanes(isa)``."""
    parsed = parse_target(ALL_TARGETS[target])
    isa = instruction_set(isa_of(parsed), cpu_features(parsed))

    def body(x, y):
        vector_runs(len(source), lanes(isa), lambda at, n: store(y, at, expression(load(x, at, n), isa), n))

    specs = [TensorSpec(source.shape, str(source.dtype)), TensorSpec(source.shape, dtype)]
    with parsed:
        function = tvm.compile(tvm.IRModule({"main": build_prim_func("main", specs, body)}), target=parsed)
    result = tvm.runtime.tensor(np.zeros(source.shape, dtype))
    function["main"](tvm.runtime.tensor(source), result)
    return result.numpy()


def skip_unless_runs(target: str) -> None:
    if target != "native" and not machine_runs(target):
        pytest.skip(f"this CPU has no {target}")


@pytest.mark.parametrize("layout", COMPUTED)
@pytest.mark.parametrize("target", ALL_TARGETS)
def test_every_code_decodes_as_in_numpy(target, layout):
    skip_unless_runs(target)
    codes = np.arange(256, dtype=np.uint8)
    found = apply(
        target,
        codes,
        "int16",
        lambda isa: 2 * isa.lanes,
        lambda x, isa: decode_expr(x, LAYOUTS[layout], "int16", isa),
    )
    np.testing.assert_array_equal(found, decode_grid(codes, layout))


def values_around_midpoints(layout: str) -> np.ndarray:
    grid = np.unique(decode_grid(np.arange(256, dtype=np.uint8), layout)).astype(np.float32)
    middle = (grid[:-1] + grid[1:]) / 2
    points = np.concatenate([grid, middle, np.float32([1e-45, 1e-30, 0.2, 3e38, np.inf, np.nan, 0.0])])
    points = np.concatenate([np.nextafter(points, -np.inf), points, np.nextafter(points, np.inf)])
    points = np.concatenate([points, -points]).astype(np.float32)
    return np.concatenate([points, np.zeros(-len(points) % 16, np.float32)])


@pytest.mark.parametrize("layout", COMPUTED)
@pytest.mark.parametrize("target", ALL_TARGETS)
def test_encode_rounds_as_in_numpy_around_every_midpoint(target, layout):
    skip_unless_runs(target)
    values = values_around_midpoints(layout)
    found = apply(
        target, values, "uint8", lambda isa: isa.lanes, lambda v, isa: encode_expr(v, LAYOUTS[layout], isa)
    )
    expected = encode(np.where(np.isnan(values), 0, values), layout=layout)
    np.testing.assert_array_equal(found, expected)
