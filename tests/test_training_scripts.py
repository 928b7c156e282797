"""The training scripts without their data: the loop learns, and the bars say what was asked."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is an extra")

with pytest.MonkeyPatch.context() as patch:
    # The script sets these for its own process.
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setenv("TVM_NUM_THREADS", "1")
    import bench_training

import qat  # noqa: E402
import train_interpolated  # noqa: E402

from zoo.fashion_mnist import SmallResNet, accuracy, train  # noqa: E402


def test_the_loop_learns_and_is_repeatable():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(512) % 2
    images = torch.randn(512, 1, 28, 28, generator=generator) + 2 * labels[:, None, None, None]
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        model = SmallResNet(4)
        train(model, images, labels, epochs=3, rate=0.1, seed=1)
        assert not model.training
        found.append(accuracy(model, images, labels))
    assert found[0] == found[1] > 0.9


@pytest.mark.parametrize(
    ("accuracy_lost", "kept"), [(0.0, True), (0.004, True), (0.006, False), (-0.01, True)]
)
def test_bar_of_interpolated_training(accuracy_lost, kept):
    runs = [
        {"kind": kind, "accuracy": 0.9 * (1 - lost)}
        for kind, lost in (("exact", 0.0), ("interpolated", accuracy_lost), ("exact", 0.0))
    ]
    assert train_interpolated.compare(runs).kept is kept


def test_bars_of_qat():
    def run(qfp8: float, int8: float, different: int) -> dict:
        scores = {"float32": 0.9, "QFP8 qat": qfp8, "int8 qat": int8, "QFP8 ptq": 0.9, "QFP8 bn": 0.9}
        return scores | {"features that differ when compiled": different}

    kept = {bar.what: bar.kept for bar in qat.bars([run(0.902, 0.901, 0), run(0.899, 0.9, 0)])}
    assert all(kept.values()) and len(kept) == 4
    kept = {bar.what: bar.kept for bar in qat.bars([run(0.89, 0.90, 0), run(0.891, 0.9, 3)])}
    assert [what for what, value in kept.items() if value] == ["QFP8 bn less ptq"]


def test_bars_of_the_bench():
    row = {
        "function": "gelu",
        "size": 1 << 20,
        "dtype": "float32",
        "speedup": {"training": 1.4, "inference": 3.0},
    }
    (bar,) = bench_training.bars(row)
    assert not bar.kept and bar.limit == ">= 1.5"
    assert bench_training.bars(row | {"dtype": "bfloat16"}) == []


def test_a_measurement_of_the_bench():
    found = bench_training.measure("silu", 1 << 14, torch.float32, turns=2)
    assert found["speedup"].keys() == {"training", "inference"}
    assert min(found["microseconds"].values()) > 0
