"""The models' benchmark: its arithmetic."""

import bench_models


def test_scaling_efficiency_is_against_one_thread():
    def row(threads: int, ours: float, peer: float) -> dict:
        return {"model": "m", "threads": threads, "milliseconds": {"qfp8": ours, "peer": peer}}

    rows = [row(1, 8.0, 10.0), row(2, 4.0, 8.0), {**row(2, 1.0, 1.0), "model": "without one thread"}]
    bench_models.add_scaling_efficiency(rows)
    assert rows[1]["scaling_efficiency"] == {"qfp8": 1.0, "peer": 0.625}
    assert "scaling_efficiency" not in rows[0] and "scaling_efficiency" not in rows[2]
