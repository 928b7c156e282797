"""Samples and models that calibration refuses, and the memory that samples take."""

import os
import tracemalloc

import numpy as np
import pytest
from relax_programs import build, images, random, small_network
from tvm import relax
from tvm.relax import op as R

from tvm_qfp8.calibration import calibrate
from tvm_qfp8.errors import CalibrationError, ModelError

BAD = {
    "missing": (lambda s: {"y": s["x"]}, "sample 2 misses input 'x': found 'y', expected 'x'"),
    "shape": (
        lambda s: {"x": s["x"][0]},
        r"sample 2, input 'x': found shape \(12, 12, 3\), expected \(1, 12",
    ),
    "dtype": (
        lambda s: {"x": s["x"].astype(float)},
        "sample 2, input 'x': found dtype float64, expected float32",
    ),
    "nan": (lambda s: {"x": s["x"] + np.float32(np.nan)}, "sample 2, input 'x': found nan at"),
    "type": (lambda s: s["x"], "sample 2 is a ndarray"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_sample_is_named_and_nothing_is_left_behind(kind, tmp_path):
    change, message = BAD[kind]
    samples = images(3)
    samples[2] = change(samples[2])
    with pytest.raises(CalibrationError, match=message):
        calibrate(small_network(), samples, spill_folder=str(tmp_path))
    assert not os.listdir(tmp_path)


def test_no_samples_and_unreadable_files_are_errors(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 cut off")
    for batches in ([], tmp_path / "missing.npz", tmp_path / "broken.npz"):
        with pytest.raises(CalibrationError):
            calibrate(small_network(), batches)


def test_weight_that_is_not_finite_is_refused():
    bad = relax.const(np.float32([[1, np.nan], [np.inf, 0]]))
    with pytest.raises(ModelError, match="lv .relax.matmul. holds 2 values"):
        calibrate(build({"x": ((3, 2), "float32")}, lambda emit, x: emit(R.matmul(x, bad))), None)


def test_memory_does_not_grow_with_the_samples(tmp_path):
    mod = small_network()

    def peak(count):
        tracemalloc.start()
        calibrate(
            mod, ({"x": random(1, 12, 12, 3, seed=i)} for i in range(count)), spill_folder=str(tmp_path)
        )
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(4)
    few, many = peak(60), peak(120)
    sample_bytes = 60 * 12 * 12 * 8 * 4 * 2  # one 8-channel tensor of the added samples, both flows
    assert many - few < sample_bytes / 8
    assert not os.listdir(tmp_path)
