"""Bars and tables of the scripts about nonlinear layers, without their measurements."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("rich")

with pytest.MonkeyPatch.context() as patch:
    # The scripts set these for their own processes.
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setenv("TVM_NUM_THREADS", "1")
    import accuracy_nonlinear
    import bench_segments

from tvm_qfp8.tables.families import find_function  # noqa: E402
from zoo.segments import GATHER_SEGMENTS, REGISTER_SEGMENTS, fitted  # noqa: E402


@pytest.mark.parametrize(("lost", "kept"), [(0.0, True), (0.0009, True), (-0.0009, True), (0.002, False)])
def test_score_stays_within_a_thousandth(lost, kept):
    scored = {"tasks": {"words": {"relative_loss": lost}}}
    (bar,) = accuracy_nonlinear.bars({"runners": {"interpolated": scored}})
    assert bar.kept == kept and bar.measured == abs(lost)


@pytest.mark.parametrize("cells, segments", [(8, 3), (8, 8), (16, 10), (32, 24), (64, 64)])
def test_tables_of_any_number_of_segments(cells, segments):
    table = fitted("gelu", segments, 2, cells)
    x = np.linspace(-12, 12, 100_001, dtype=np.float32)
    error = np.abs(table(x) - find_function("gelu").reference(x.astype(np.float64)))
    assert table.cells == cells
    # The sweep cuts the tail at 1e-5 of its limit.
    assert error.max() <= table.max_error + 2e-5
    blocks = np.array(table.coefficients).reshape(3, -1, min(cells, 8))
    # No two look-ups alike: LLVM would leave one out.
    assert (
        len({block.tobytes() for block in blocks.reshape(-1, min(cells, 8))})
        == blocks.shape[0] * blocks.shape[1]
    )


def test_more_segments_make_a_smaller_error():
    errors = [fitted("gelu", n, 1, cells).max_error for cells, ns in REGISTER_SEGMENTS.items() for n in ns]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > fitted("gelu", GATHER_SEGMENTS[-1], 1, GATHER_SEGMENTS[-1]).max_error


def row(form, seconds, segments=8, degree=2, size=16384):
    return {
        "form": form,
        "function": "gelu",
        "degree": degree,
        "size": size,
        "segments": segments,
        "seconds": seconds,
    }


@pytest.mark.parametrize(("slower", "kept"), [(1.05, True), (1.2, False)])
def test_bar_of_the_sweep_takes_ratios_turn_by_turn(slower, kept):
    turns = np.array([1.0, 3.0, 1.1])
    rows = [row("registers of 8", turns.tolist(), 4), row("registers of 8", (slower * turns).tolist(), 8)]
    (bar,) = bench_segments.bars([*rows, row("gather", [9.0] * 3, 64)])
    assert bar.kept == kept and bar.measured == pytest.approx(slower)


def test_verdict_compares_with_the_faster_gathered_table():
    rows = [
        row("compiler's at 0.001", [1.0, 1.0, 1.0]),
        row("gather at 0.001", [3.0, 3.0, 3.0], 64, 1),
        row("gather at 0.001", [2.0, 2.0, 2.0], 32, 2),
        row("gather at 0.0001", [0.5, 0.5, 0.5], 32, 2),
    ]
    (found,) = bench_segments.verdict(rows)
    assert found["times_as_fast_as_gather"] == 2.0
    assert found["gathered"] == ["64 cells of degree 1", "32 cells of degree 2"]
