"""The bars of the accuracy script, on measurements made up here."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from accuracy import joined

from zoo.bars import bars


def runner(loss: float, high: float, sqnr: float) -> dict:
    task = {"relative_loss": loss, "relative_high": high, "loss": loss, "items": 100}
    return {"tasks": {"photos": task}, "sqnr_db": sqnr, "agreement": 0.99}


def test_each_peer_has_its_bars():
    found = {"runners": {"qfp8": runner(0.002, 0.005, 25.0), "int8": runner(0.01, 0.02, 12.0)}}
    assert [bar.kept for bar in bars("minilm", found)] == [True] * 4
    found["runners"]["nncf"] = runner(0.001, 0.02, 26.0)
    missed = [bar for bar in bars("minilm", found) if not bar.kept]
    assert [bar.limit for bar in missed] == ["<= NNCF's int8 0.0010", "> NNCF's int8 26.0"]


def test_losses_are_bounded_for_every_task():
    found = {"runners": {"qfp8": runner(0.004, 0.007, 25.0)}}
    assert [bar.kept for bar in bars("ppocr", found)] == [False, False]
    assert all(bar.kept for bar in bars("mobilenetv2", {"runners": {"qfp8": runner(0.0, 0.0, 22.5)}}))


def test_runners_measured_before_are_kept_where_float32_is_the_same():
    old = {
        "measured": {"date": "1"},
        "runners": {"float32": {"tasks": {}}, "int8": {"sqnr_db": 1.0}},
        "bars": [],
    }
    new = {"measured": {"date": "2"}, "runners": {"float32": {"tasks": {}}, "qfp8": {"sqnr_db": 2.0}}}
    found = joined(old, new)
    assert found["runners"]["int8"] == {"sqnr_db": 1.0} and found["measured"] == {"date": "1"}
    assert found["runners"]["qfp8"] == {"sqnr_db": 2.0, "measured": {"date": "2"}}
    assert joined(None, new) == new
    other = {**new, "runners": {**new["runners"], "float32": {"tasks": {"photos": {}}}}}
    assert joined(old, other) == other
