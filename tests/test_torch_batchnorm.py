"""BatchNorm statistics re-estimated with rounded weights."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch", reason="torch is an extra")

from torch import nn  # noqa: E402

import tvm_qfp8 as q  # noqa: E402
from tvm_qfp8.errors import CalibrationError  # noqa: E402


def _batches(count: int = 12):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, 3, 8, 8, generator=generator) + 0.5 for _ in range(count)]


@pytest.fixture
def trained():
    """A network whose statistics are those of its data."""
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in ((3, 16), (16, 16), (16, 8)):
        layers += [nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs, momentum=None), nn.SiLU()]
    model = nn.Sequential(*layers).train()
    with torch.no_grad():
        for batch in _batches():
            model(batch)
    return model.eval()


def _harmed(model):
    """Weights on nine levels a tensor, half of each channel's mean gone."""
    harmed = copy.deepcopy(model)
    with torch.no_grad():
        for layer in harmed:
            if isinstance(layer, nn.Conv2d):
                step = layer.weight.abs().max() / 4
                layer.weight.copy_((layer.weight / step).round() * step)
    return harmed


def _error(model, exact) -> float:
    with torch.no_grad():
        return float(sum((model(x) - exact(x)).square().mean() for x in _batches(4)))


def test_statistics_fit_rounded_weights_and_the_output_gets_better(trained):
    harmed = _harmed(trained)
    before = _error(harmed, trained)
    done = q.torch.recalibrate_batchnorm(harmed, iter(_batches()))
    assert not done.kept_old and done.after > done.before
    assert (done.layers, done.batches) == (3, 9)
    assert _error(harmed, trained) < 0.9 * before
    first = harmed[0](torch.cat([b for i, b in enumerate(_batches()) if i % 4 != 3]))
    torch.testing.assert_close(harmed[1].running_mean, first.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(harmed[1].running_var, first.var((0, 2, 3)), atol=1e-5, rtol=1e-4)


def test_worse_statistics_are_not_taken(trained):
    state = copy.deepcopy(trained.state_dict())
    reference = copy.deepcopy(trained)
    # These batches are nothing like the data that the metric looks at.
    batches = [10 * b for b in _batches(4)]
    done = q.torch.recalibrate_batchnorm(trained, batches, metric=lambda model: -_error(model, reference))
    assert done.kept_old and "kept the old" in str(done)
    assert all(torch.equal(value, state[name]) for name, value in trained.state_dict().items())


def test_modes_of_the_layers_stay(trained):
    trained.train()
    trained[1].eval()
    q.torch.recalibrate_batchnorm(trained, [(b,) for b in _batches(3)])
    assert trained.training and not trained[1].training and trained[4].training
    assert not trained[1]._forward_hooks and not trained[1]._forward_pre_hooks


@pytest.mark.parametrize(
    ("model", "batches"),
    [(nn.Sequential(nn.BatchNorm2d(3)), []), (nn.Conv2d(3, 3, 1), [torch.zeros(1, 3, 4, 4)])],
)
def test_nothing_to_estimate_is_refused(model, batches):
    with pytest.raises(CalibrationError, match="at least one of each"):
        q.torch.recalibrate_batchnorm(model, batches)


def test_values_that_are_not_finite_are_refused(trained):
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        q.torch.recalibrate_batchnorm(trained, [torch.full((2, 3, 8, 8), float("nan"))])
