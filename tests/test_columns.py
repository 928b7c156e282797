"""Softmax, log-softmax and norms over any axis: one kernel, the bits of the NumPy twin over the last axis."""

from __future__ import annotations

import numpy as np
import pytest
from models import model
from onnx import helper
from quantized_programs import TARGETS, build, machine_runs, program, run
from tvm import relax

import tvm_qfp8
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.tables import build_table
from tvm_qfp8.tables.softmax import build_softmax_exp, softmax_exp_error
from tvm_qfp8.topi import reference

torch = pytest.importorskip("torch", reason="torch is an extra")

F = torch.nn.functional
LENGTH = 37
RNG = np.random.default_rng(0)
GAMMA, BETA = RNG.standard_normal((2, LENGTH)).astype(np.float32)


def _log_softmax(x):
    exp, log = build_table("exp", 1e-3 / 4, domain=(-87.0, 0.0)), build_table("log", 1e-3 / 4)
    shifted = x - x.max(-1, keepdims=True)
    return shifted - log(reference.lane_sum(exp(shifted)))[..., None]


OPERATORS = {
    "softmax": (
        lambda v, axis: relax.op.nn.softmax(v, axis),
        lambda x: reference.softmax(x, build_softmax_exp(softmax_exp_error(1e-3, LENGTH))),
    ),
    "log_softmax": (lambda v, axis: relax.op.nn.log_softmax(v, axis), _log_softmax),
    "layer_norm": (
        lambda v, axis: relax.op.nn.layer_norm(
            v, relax.const(GAMMA), relax.const(BETA), axes=axis, epsilon=1e-5
        ),
        lambda x: reference.layer_norm(x, GAMMA, BETA, 1e-5),
    ),
    "rms_norm": (
        lambda v, axis: relax.op.nn.rms_norm(v, relax.const(GAMMA), axes=axis, epsilon=1e-5),
        lambda x: reference.rms_norm(x, GAMMA, 1e-5),
    ),
    "l2_normalize": (
        lambda v, axis: qfp8_ops.l2_normalize(v, 1e-12, axis),
        lambda x: reference.l2_normalize(x, 1e-12),
    ),
}


def quantized(name: str, shape: tuple[int, ...]):
    """A program of the operator over axis 1, and of a residual after it in the same kernel."""
    return program(
        [(shape, None)],
        lambda builder, v: relax.op.add(builder.emit(OPERATORS[name][0](v, 1)), v),
    )


def twin(name: str, x: np.ndarray) -> np.ndarray:
    return OPERATORS[name][1](x.swapaxes(1, -1)).swapaxes(1, -1) + x


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("inner", [1, 7, 70])
@pytest.mark.parametrize("target", TARGETS)
def test_columns_follow_the_contract(target, inner, name):
    if not machine_runs(target):
        pytest.skip(f"this CPU does not run {target}")
    x = RNG.standard_normal((3, LENGTH, inner)).astype(np.float32) * 3
    (got,) = run(build(quantized(name, x.shape), TARGETS[target], threads=2), x)
    assert np.array_equal(got, twin(name, x))


@pytest.mark.aarch64
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", [(3, LENGTH), (2, LENGTH, 1), (3, LENGTH, 23)])
def test_aarch64_equals_the_twin(run_aarch64, name, shape):
    x = RNG.standard_normal(shape).astype(np.float32) * 3
    (got,) = run_aarch64(build(quantized(name, shape), "aarch64"), [x])
    assert np.array_equal(got, twin(name, x))


def compiled(nodes, shape, x):
    module = tvm_qfp8.compile(model(nodes, {"x": shape}, {"y": shape}, {}, 13))
    assert [layer.became.split(",")[0] for layer in module.report.layers] == ["fused row kernel"]
    return module.run({"x": x})[0]


@pytest.mark.parametrize(
    "shape, axis",
    [((2, 19, 9, 7), 0), ((2, 19, 9, 7), -3), ((2, 19, 9, 7), 2), ((1, 5, 1, 1), 1), ((1, 1, 2, 1), -2)],
)
def test_softmax_over_every_axis(shape, axis):
    x = RNG.standard_normal(shape).astype(np.float32) * 3
    got = compiled([helper.make_node("Softmax", ["x"], ["y"], axis=axis)], shape, x)
    np.testing.assert_allclose(got, torch.softmax(torch.from_numpy(x), axis), atol=1e-3)
    moved = np.ascontiguousarray(np.moveaxis(x, axis, -1))
    last = compiled([helper.make_node("Softmax", ["x"], ["y"], axis=-1)], moved.shape, moved)
    assert np.array_equal(np.moveaxis(got, axis, -1), last)


@pytest.mark.parametrize("axis", [0, -2])
def test_torch_normalizes_over_an_axis(axis):
    class Normalized(torch.nn.Module):
        def forward(self, x):
            return F.normalize(torch.log_softmax(x, axis), dim=axis)

    x = torch.randn(4, 6, 50)
    module = tvm_qfp8.compile(torch.export.export(Normalized(), (x,)))
    assert [layer.became.split(",")[0] for layer in module.report.layers] == ["fused row kernel"] * 2
    np.testing.assert_allclose(module(x.numpy())[0], Normalized()(x).numpy(), atol=1e-3)


def test_nan_stays_in_its_column():
    x = np.ones((2, 5, 6, 7), np.float32)
    x[1, 2, 3, 4] = np.nan
    got = compiled([helper.make_node("Softmax", ["x"], ["y"], axis=1)], x.shape, x)
    assert np.isnan(got[1, :, 3, 4]).all() and np.isnan(got).sum() == 5


def test_no_samples():
    module = tvm_qfp8.compile(program([((0, 5, 3), None)], lambda _builder, v: relax.op.nn.softmax(v, 1)))
    assert module(np.zeros((0, 5, 3), np.float32))[0].shape == (0, 5, 3)
