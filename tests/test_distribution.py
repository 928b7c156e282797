"""Values on a layout's grid, binned."""

import numpy as np
import pytest

from tvm_qfp8.distribution import HIGHEST, LOWEST, QUARTERS, Distribution, distribution_of, edges


def test_bins_hold_what_lies_between_their_edges():
    values = np.random.default_rng(0).standard_t(3, 10_000).astype(np.float32) * 20
    found = distribution_of(values)
    bounds = edges(found.first, len(found.ppm))
    magnitude = np.maximum(np.abs(values), bounds[0])  # the first bin takes what is smaller
    expected = np.histogram(magnitude, bounds)[0] / len(values)
    np.testing.assert_allclose(np.array(found.ppm) / 1e6, expected, atol=1e-6)
    assert found.zeros == 0 and found.ppm[0] and found.ppm[-1]


def test_edges_are_quarters_of_binades():
    np.testing.assert_array_equal(edges(0, 4), [1, 1.25, 1.5, 1.75, 2])
    np.testing.assert_array_equal(edges(-4, 1), [0.5, 0.625])


def test_counts_weigh_and_zeros_are_apart():
    found = distribution_of(np.array([0.0, -1.0, 2.0]), np.array([2, 1, 1]))
    assert found == Distribution(0.5, 0, [250_000, 0, 0, 0, 250_000])


def test_a_single_value_of_many_is_seen():
    values = np.ones(5_000_000, np.float32)
    values[7] = 300
    assert distribution_of(values).ppm[-1] == 1


def test_size_is_bounded_and_what_is_beyond_is_found():
    found = distribution_of(np.array([1e-30, 1e30, 250.0, 260.0], np.float32))
    assert (found.first, len(found.ppm)) == (LOWEST * QUARTERS, (HIGHEST - LOWEST) * QUARTERS + 1)
    assert found.beyond(252) == pytest.approx(0.5)


@pytest.mark.parametrize("values", [[], [0.0, 0.0]])
def test_nothing_to_bin(values):
    found = distribution_of(np.array(values, np.float32))
    assert found.ppm == [] and found.zeros == (1.0 if values else 0.0) and found.beyond(1) == 0
