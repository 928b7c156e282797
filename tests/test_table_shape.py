"""Tables that meet at their boundaries, pass through points, and rise and fall with the function."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_qfp8.errors import TableError
from tvm_qfp8.tables import build_table
from tvm_qfp8.tables.families import find_function
from tvm_qfp8.tables.observe import errors, sample_inputs
from tvm_qfp8.tables.shape import Course, course_of, reversal

NAMED = ("gelu", "silu", "mish", "softplus", "tanh", "erf", "sigmoid", "elu", "selu", "gelu'", "tanh'")


def boundary_values(table) -> tuple[np.ndarray, np.ndarray]:
    """The float32 that the cells left and right of each inner boundary give there."""
    step = table.magic / 12582912.0
    first, last = round(table.low / step), round(table.high / step)
    cells = np.arange(first, last)
    t = ((cells + 0.5) * step).astype(np.float32)
    c = np.array(table.coefficients, np.float32)

    def value(n):
        variable = t - np.float32(n * step) if table.centred else t
        result = c[-1][n % table.cells]
        for power in c[-2::-1]:
            result = (result * variable).astype(np.float32) + power[n % table.cells]
        return result

    inside = (t > table.low) & (t < table.high)
    return value(cells)[inside], value(cells + 1)[inside]


def ascending(count: int, low: float, high: float) -> np.ndarray:
    """Ascending float32 values: evenly spaced, and of every magnitude."""
    small = sample_inputs(count, low, high)
    return np.unique(np.concatenate([small, np.linspace(low, high, count, dtype=np.float32)]))


# Mish's 32 cells at 1e-5 take seconds.
@pytest.mark.parametrize(
    "name, max_error", [(n, e) for n in NAMED for e in (1e-3, 1e-5) if (n, e) != ("mish", 1e-5)]
)
def test_continuous_cells_meet_to_the_bit(name, max_error):
    table = build_table(name, max_error, continuous=True)
    left, right = boundary_values(table)
    assert len(left) >= 4
    np.testing.assert_array_equal(left, right)
    x = sample_inputs(200_000)
    with np.errstate(all="ignore"):
        observed = errors(table(x), find_function(name).reference(x.astype(np.float64)), table.relative)
    assert observed.max() <= table.max_error <= max_error


def test_cells_do_not_meet_unasked():
    left, right = boundary_values(build_table("gelu", 1e-3))
    assert (left != right).any()


@pytest.mark.parametrize("name", NAMED)
def test_monotone_where_the_function_is(name):
    table = build_table(name, 1e-3, monotone=True)
    reference = find_function(name).reference
    course = course_of(lambda x: reference(x), -12.0, 12.0)
    turns = [-np.inf, *course.turns, np.inf]
    x = ascending(300_000, -20.0, 20.0)
    for k, (low, high) in enumerate(zip(turns[:-1], turns[1:], strict=True)):
        sign = course.first_sign * (-1) ** k
        y = sign * table(x[(x > low) & (x < high)]).astype(np.float64)
        assert (np.maximum.accumulate(y) - y).max() <= table.reversal <= 8e-6
    assert table.continuous and table.max_error <= 1e-3


def test_free_tables_are_not_monotone_so_that_the_test_above_means_something():
    x = np.linspace(0.0, 12.0, 200_001, dtype=np.float32)
    assert np.diff(build_table("tanh", 1e-3)(x)).min() < -1e-5


def test_linear_cells_are_monotone_to_the_bit():
    table = build_table(np.tanh, 5e-2, domain=(-3.0, 3.0), monotone=True)
    assert table.degree == 1 and table.reversal == 0.0
    assert np.diff(table(ascending(300_000, -5.0, 5.0))).min() >= 0.0


def test_monotone_between_the_turns_of_a_callable():
    table = build_table(np.sin, 1e-4, domain=(-8.0, 8.0), monotone=True)
    x = ascending(200_000, -np.pi / 2, np.pi / 2)[1:-1]
    y = table(x).astype(np.float64)
    assert (np.maximum.accumulate(y) - y).max() <= table.reversal


@pytest.mark.parametrize(
    "name, points",
    [
        ("gelu", (0.0, 1.0, -2.0)),
        ("tanh", (0.5, -0.5, 3.0)),
        ("sigmoid", (0.0, 2.0)),
        ("elu", (-1.0, 1.5)),
        ("silu'", (1.0,)),
    ],
)
def test_exact_at_points(name, points):
    table = build_table(name, 1e-4, exact_at=points)
    expected = find_function(name).reference(np.array(points)).astype(np.float32)
    np.testing.assert_array_equal(table(points), expected)
    assert table.max_error <= 1e-4


def test_exact_at_the_ends_of_a_domain_and_all_options_together():
    table = build_table(
        np.arctan, 1e-4, domain=(-6.0, 6.0), symmetry="odd", exact_at=(6.0, 0.0, 1.0), monotone=True
    )
    points = np.array([-6.0, -1.0, 0.0, 1.0, 6.0])
    np.testing.assert_array_equal(table(points), np.arctan(points).astype(np.float32))
    np.testing.assert_array_equal(table([100.0]), np.arctan([6.0]).astype(np.float32))
    left, right = boundary_values(table)
    np.testing.assert_array_equal(left, right)
    assert table.observed_error <= table.max_error <= 1e-4


SYMMETRIC = {
    "even": (lambda x: 1.0 / (1.0 + x * x), "symmetric"),
    "odd": (np.arctan, "odd"),
    "logistic": (lambda x: 0.5 + np.arctan(x) / np.pi, "logistic"),
    "rectifier": (lambda x: 0.5 * (x + np.sqrt(x * x + 1.0)), "even"),
}


@pytest.mark.parametrize("symmetry", SYMMETRIC)
def test_declared_symmetry(symmetry):
    function, reduction = SYMMETRIC[symmetry]
    table = build_table(function, 1e-4, domain=(-5.0, 5.0), symmetry=symmetry)
    plain = build_table(function, 1e-4, domain=(-5.0, 5.0))
    assert table.reduction == reduction and table.nbytes < plain.nbytes
    x = np.linspace(-5, 5, 20_001, dtype=np.float32)
    exact = function(x.astype(np.float64))
    assert (np.abs(table(x) - exact) / np.maximum(1, np.abs(exact))).max() <= table.max_error <= 1e-4
    assert np.isnan(table(np.nan))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(function="exp", monotone=True), "no cells side by side.*give domain"),
        (dict(function="sqrt", continuous=True), "plain arithmetic"),
        (dict(function="sigmoid", exact_at=(-2.0,)), "cannot be exact at -2.*rounds"),
        (dict(function="gelu", exact_at=(float("inf"),)), "finite points"),
        (dict(function=np.sin, domain=(0.0, 1.0), exact_at=(2.0,)), "exact_at holds 2"),
        (dict(function=np.sin, domain=(-1.0, 1.0), symmetry="even"), "sin is not even.*off by"),
        (dict(function=np.sin, domain=(-1.0, 2.0), symmetry="odd"), "domain \\(-a, a\\)"),
        (dict(function=np.sin, domain=(-1.0, 1.0), symmetry="mirror"), "there are even, odd"),
        (dict(function="tanh", symmetry="odd"), "is known"),
        (dict(function=np.sign, domain=(-1.0, 1.0), continuous=True), "and is continuous.*fewer constraints"),
        (
            dict(function=SYMMETRIC["logistic"][0], domain=(-1, 1), relative=True, symmetry="logistic"),
            "no relative",
        ),
        (dict(function=lambda x: 1.0 / x, domain=(-1.0, 1.0), monotone=True), "not finite at 0"),
        (dict(function=lambda x: 1.0, domain=(-1.0, 1.0)), "NumPy arrays"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(TableError, match=message):
        build_table(**arguments)


def test_course_and_reversal():
    course = course_of(lambda t: t**3 - t, -2.0, 2.0)
    np.testing.assert_allclose(course.turns, [-(3**-0.5), 3**-0.5], atol=1e-6)
    assert course.sign(np.array([-1.0, 0.0, 1.0])).tolist() == [1.0, -1.0, 1.0]
    assert course_of(np.ones_like, 0.0, 1.0) == Course((), 0.0)
    rising = Course((), 1.0)
    # t**2 - t falls by 1/4 on [0, 1/2] before it rises.
    assert reversal(np.array([0.0, -1.0, 1.0]), 0.0, 2.0, 0.0, rising) == pytest.approx(0.25)
    assert reversal(np.array([0.0, 1.0]), 0.0, 2.0, 0.0, rising) == 0.0
