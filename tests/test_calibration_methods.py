"""Methods that find an activation's scale: what each gives on known distributions, and through ``calibrate``."""

import numpy as np
import onnx
import pytest
from models import cnn

import tvm_qfp8
from tvm_qfp8.calibration.activations import Observer
from tvm_qfp8.calibration.thresholds import METHODS
from tvm_qfp8.errors import CalibrationError
from tvm_qfp8.format import get_layout


def _largest(method, values):
    observer = Observer()
    observer.record(values.reshape(1, -1))
    choice = observer.choose(("E2M5",), method).activation
    return choice.scale * get_layout("E2M5").max_grid


def test_max_is_the_largest_value():
    values = np.random.default_rng(0).normal(0, 1, 10_000).astype(np.float32)
    assert _largest("max", values) == pytest.approx(np.abs(values).max(), rel=2**-9)


def test_percentile_leaves_out_the_few_largest():
    values = np.random.default_rng(0).uniform(-1, 1, 100_000).astype(np.float32)
    values[:5] = 100.0
    assert _largest("percentile", values) == pytest.approx(1, rel=0.01)


def test_entropy_keeps_an_even_distribution_and_clips_far_values():
    values = np.random.default_rng(0).uniform(-1, 1, 100_000).astype(np.float32)
    assert _largest("entropy", values) == pytest.approx(1, rel=0.1)
    values[:5] = 100.0
    assert _largest("entropy", values) < 10


def test_no_method_has_less_squared_error_than_mse():
    values = np.random.default_rng(1).standard_t(4, 50_000).astype(np.float32)

    def error(method):
        largest = _largest(method, values)
        scale = largest / get_layout("E2M5").max_grid
        return np.square(tvm_qfp8.decode(tvm_qfp8.encode(values, scale), scale) - values).sum()

    least = error("mse")
    assert all(least <= error(method) * 1.001 for method in METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_compile_takes_every_method(method, tmp_path):
    model = cnn()
    onnx.checker.check_model(model)
    shape = tuple(d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim)
    name = model.graph.input[0].name
    rng = np.random.default_rng(0)
    samples = [{name: rng.normal(0, 1, shape).astype(np.float32)} for _ in range(4)]
    module = tvm_qfp8.compile(model, calibration=samples, config=tvm_qfp8.Config(method=method))
    assert all(np.isfinite(out).all() for out in module.run(samples[0]))


def test_an_unknown_method_is_refused():
    with pytest.raises(CalibrationError, match="method 'average' is not known; use one of mse, max"):
        tvm_qfp8.compile(cnn(), calibration=[], config=tvm_qfp8.Config(method="average"))
