"""How threads share the rows or the panels of a kernel."""

import pytest

from tvm_qfp8.topi.sharing import favours_rows, rows_of_block, shared_blocks


@pytest.mark.parametrize(
    "rows, step, panels, threads, decodes, expected",
    [
        (3136, 14, 2, 2, True, True),  # many rows: who brings activations would keep the others waiting
        (784, 14, 8, 4, False, True),
        (100, 14, 4, 2, True, False),  # few rows, all weights decoded by each thread
        (5, 1, 4, 2, False, False),  # 3 of 5 rows, but 2 of 4 panels
        (5, 1, 3, 2, False, True),  # 3 of 5 rows, and 2 of 3 panels
        (3, 1, 1, 2, False, True),  # nothing to share but rows
        (7, 7, 8, 2, False, False),  # nor any rows to share
        (7, 7, 0, 2, False, False),  # no columns: no work
    ],
)
def test_the_busiest_thread_has_least_to_do(rows, step, panels, threads, decodes, expected):
    assert favours_rows(rows, step, panels, threads, decodes) == expected


@pytest.mark.parametrize(
    "rows, threads, expected", [(56, 2, 14), (10, 2, 5), (7, 2, 2), (9, 2, 5), (1, 4, 1)]
)
def test_blocks_are_halves_of_shares_where_those_are_not_more(rows, threads, expected):
    assert rows_of_block(rows, threads) == expected
    blocks = -(-rows // expected)
    assert -(-blocks // threads) * expected == -(-rows // threads)


@pytest.mark.parametrize(
    "extent, most, threads, multiple, expected",
    [
        (14, 6, 1, 1, (5, 3)),
        (14, 6, 2, 1, (4, 4)),  # two for each, not two and one
        (3136, 768, 2, 14, (532, 6)),
        (3136, 4096, 2, 14, (1568, 2)),
        (1, 9, 4, 1, (1, 1)),
    ],
)
def test_every_thread_has_as_many_blocks(extent, most, threads, multiple, expected):
    assert shared_blocks(extent, most, threads, multiple) == expected
