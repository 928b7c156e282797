"""The layout and scale of one activation, against a plain search."""

import numpy as np
import pytest
from relax_programs import random

from tvm_qfp8.calibration.activations import Observer
from tvm_qfp8.calibration.fake_quantize import fake_quantize
from tvm_qfp8.format import get_layout


def squared_error(values, layout, scale):
    return float(np.square(fake_quantize(values, layout, scale).astype(np.float64) - values).sum())


@pytest.mark.parametrize("tail", ["normal", "heavy", "relu6", "rare"])
def test_layout_and_scale_have_the_least_error_over_all_values(tail):
    """Against every layout and a dense set of scales; the search's steps and the bins may cost 0.04 dB."""
    x = random(40_000)
    if tail == "heavy":
        x = np.random.default_rng(0).standard_t(3, 40_000).astype(np.float32)
    if tail == "relu6":
        x = np.clip(3 * x, 0, 6)
    if tail == "rare":
        x[[7, 30_000]] = 60.0
    observer = Observer()
    for part in np.split(x, 8):
        observer.record(part)
    choice = observer.choose().activation
    names = [name for name in ("E2M5", "E3M4", "UE2M6", "UE3M5") if get_layout(name).signed or x.min() >= 0]
    scales = {
        name: np.abs(x).max() / get_layout(name).max_grid * np.geomspace(2, 0.02, 400) for name in names
    }
    least = min(squared_error(x, name, scale) for name in names for scale in scales[name])
    assert squared_error(x, choice.layout, choice.scale) <= 10**0.004 * least
    if tail == "rare":  # 2 of 40,000, and yet not clipped
        assert choice.scale * get_layout(choice.layout).max_grid > 50


@pytest.mark.parametrize(
    "values", [np.float32([1e-9] * 50 + [1.0]), np.geomspace(1e-6, 1e5, 500, dtype=np.float32)]
)
def test_gates_and_wide_distributions_are_no_masks(values):
    observer = Observer()
    observer.record(values)
    assert observer.choose().activation is not None
