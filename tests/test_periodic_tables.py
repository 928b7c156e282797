"""Tables with a declared period: the bound holds far from zero. Those and other variants of tables on Arm."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

from tvm_qfp8 import build_table
from tvm_qfp8.errors import TableError
from tvm_qfp8.targets import parse_target
from tvm_qfp8.topi.apply_table import ApplyTable
from tvm_qfp8.topi.isa import instruction_set


def wave(period):
    return lambda x: np.sin(2 * np.pi * x / period) + 0.5 * np.cos(6 * np.pi * x / period)


VARIANTS = {
    "periodic": lambda: build_table(wave(0.7), 1e-4, domain=(-300.0, 400.0), period=0.7),
    "continuous": lambda: build_table("tanh", 1e-3, continuous=True),
    "monotone, exact at": lambda: build_table("gelu", 1e-4, monotone=True, exact_at=(1.0,)),
    "even": lambda: build_table(lambda x: 1 / (1 + x * x), 1e-4, domain=(-5.0, 5.0), symmetry="even"),
    "odd": lambda: build_table(np.arctan, 1e-4, domain=(-5.0, 5.0), symmetry="odd"),
    "logistic": lambda: build_table(
        lambda x: 0.5 + np.arctan(x) / np.pi, 1e-4, domain=(-5.0, 5.0), symmetry="logistic"
    ),
}


@pytest.mark.parametrize("period", [1.0, 2 * np.pi, 0.1, 1000.0 / 3])
@pytest.mark.parametrize("periods", [0.4, 3.0, 900.0])
def test_bound_holds_over_the_domain(period, periods):
    function, domain = wave(period), (-periods * period, 1.3 * periods * period)
    table = build_table(function, 1e-3, domain=domain, period=period)
    low, high = np.float32(domain)
    x = np.random.default_rng(0).uniform(low, high, 300_000).astype(np.float32)
    # Where the number of periods changes, from both sides, and the ends.
    halves = ((np.arange(-900, 1200) + 0.5) * period).astype(np.float32)
    near = [halves, np.nextafter(halves, np.float32(np.inf)), np.nextafter(halves, np.float32(-np.inf))]
    x = np.concatenate([x, *near, [low, high]])
    x = x[(x >= low) & (x <= high)]
    exact = function(x.astype(np.float64))
    assert (np.abs(table(x) - exact) / np.maximum(1, np.abs(exact))).max() <= table.max_error <= 1e-3
    assert table.reduction == "periodic" and table.observed_error <= table.max_error


def test_outside_it_stays_at_the_end():
    table = build_table(np.sin, 1e-3, domain=(-20.0, 30.0), period=2 * np.pi)
    np.testing.assert_array_equal(table([1e9, np.inf, -np.inf]), table([30.0, 30.0, -20.0]))
    assert np.isnan(table(np.nan))


def test_cells_do_not_grow_with_the_domain():
    tables = [build_table(np.sin, 1e-4, domain=(-a, a), period=2 * np.pi) for a in (4.0, 4000.0)]
    assert tables[0].nbytes == tables[1].nbytes


@pytest.mark.aarch64
@pytest.mark.parametrize("form", VARIANTS)
def test_aarch64_equals_the_twin(run_aarch64, form):
    table = VARIANTS[form]()
    x = np.random.default_rng(1).normal(0, 40, 4099).astype(np.float32)
    x[:4] = np.nan, np.inf, -np.inf, -0.0
    kernel = ApplyTable(table, False, "float32", False).prim_func(instruction_set("neon"))
    module = tvm.compile(tvm.IRModule({"main": kernel}), target=parse_target("aarch64"))
    (found,) = run_aarch64(module, [x], function="main", outputs=[(x.shape, "float32")])
    np.testing.assert_array_equal(found, table(x))


@pytest.mark.parametrize(
    "function, options, message",
    [
        (np.sin, dict(period=6.28), "has no period 6.28.*declare none"),
        (np.tan, dict(period=np.pi), "no table of up to|not finite"),
        (np.sin, dict(period=-1.0), "positive"),
        (np.sin, dict(period=1e-4), "periods from zero"),
        (np.sin, dict(period=2 * np.pi, symmetry="odd"), "goes without"),
        (np.sin, dict(period=2 * np.pi, monotone=True), "goes without"),
        ("sin", dict(period=2 * np.pi), "for a callable"),
    ],
)
def test_refusals(function, options, message):
    with pytest.raises(TableError, match=message):
        build_table(function, 1e-3, domain=(-20.0, 20.0), **options)
