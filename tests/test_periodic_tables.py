"""Tables of functions with a declared period: the bound holds far from zero, what is no period is refused."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_qfp8 import build_table
from tvm_qfp8.errors import TableError


def wave(period):
    return lambda x: np.sin(2 * np.pi * x / period) + 0.5 * np.cos(6 * np.pi * x / period)


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
