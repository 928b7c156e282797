"""Operators of ``torch.export`` programs that TVM's front end lacks or has wrong, against torch."""

import numpy as np
import pytest

from tvm_qfp8.calibration import evaluate
from tvm_qfp8.errors import UnsupportedOperatorError
from tvm_qfp8.importers import load_model
from tvm_qfp8.relay_passes.prepare import prepare

torch = pytest.importorskip("torch", reason="torch is an extra")
F = torch.nn.functional


class Several(torch.nn.Module):
    """The results of several functions of the same inputs."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    def forward(self, *inputs):
        return tuple(function(*inputs) for function in self.functions)


def check(functions, *inputs):
    model = Several(functions).eval()
    imported = load_model(torch.export.export(model, inputs))
    arrays = [tensor.numpy() for tensor in inputs]
    found = evaluate(prepare(imported.mod), dict(zip(imported.input_names, arrays, strict=True)))
    for number, (ours, theirs) in enumerate(zip(found, model(*inputs), strict=True)):
        assert ours.dtype == theirs.numpy().dtype, number
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5, err_msg=str(number))


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def assigned(x, where, values):
    y = x.clone()
    y[where] = values
    return y


def written(x):
    y = x.clone()
    y[:, 1:3] = 0
    y[:, -1, 2] = x[:, 0, 0]
    y[..., 0] += 1
    return y


def test_indices():
    first, second = torch.tensor([1, 0]), torch.tensor([-1, 2])
    check(
        [
            lambda x: x[:, -1],
            lambda x: x.select(2, -2),
            lambda x: x[:, [0, -1, 2]],
            lambda x: x[:, first[:, None]],
            lambda x: x[..., torch.tensor(-3)],
            lambda x: x[first, second],
            lambda x: x[:, first, second],
            lambda x: x[first, :, second],
            lambda x: x[:, first[:, None], second],
            lambda x: torch.index_put(x, (first, second), x[:, 0]),
            lambda x: assigned(x, (slice(None), first, second), x[:, 0, :2]),
            lambda x: assigned(x, (first, slice(None), second), x[:, :, 0]),
            lambda x: x.index_add(1, torch.tensor([0, 0, 2]), x[:, :3]),
            lambda x: x.index_copy(1, torch.tensor([0, 2]), x[:, :2]),
            lambda x: x.unfold(-1, 4, 2),
            lambda x: x.unfold(1, 2, 3),
            written,
        ],
        random(2, 6, 8),
    )


def test_reductions():
    check(
        [
            lambda x: x.max(1)[0],
            lambda x: x.max(1)[1],
            lambda x: x.min(-1, keepdim=True)[0],
            lambda x: x.amin((1, 2)),
            lambda x: x.prod(1),
            lambda x: x.var(),
            lambda x: x.std((1, 2), unbiased=False, keepdim=True),
            lambda x: torch.var_mean(x, 1)[0],
            lambda x: (x > 2).any(),
            lambda x: torch.cdist(x, x + 1),
            lambda x: F.cross_entropy(x[0], torch.arange(6)),
            lambda x: x.scatter_add(1, torch.full((2, 3, 8), 2), x[:, :3]),
            lambda x: x.scatter_reduce(1, torch.full((2, 3, 8), 2), x[:, :3], "amax"),
        ],
        random(2, 6, 8),
    )


def test_arithmetic():
    check(
        [
            lambda x, n: torch.add(x, x, alpha=2.5),
            lambda x, n: torch.exp2(x),
            lambda x, n: torch.erfc(x),
            lambda x, n: torch.hypot(x, x + 1),
            lambda x, n: torch.sinh(x),
            lambda x, n: n / 2,
            lambda x, n: n // 2,
            lambda x, n: torch.div(n, 3, rounding_mode="trunc"),
            lambda x, n: x // 2,
            lambda x, n: torch.div(x, 2, rounding_mode="trunc"),
            lambda x, n: n.clamp(min=-1),
            lambda x, n: n.exp(),
            lambda x, n: n + torch.arange(21, -3, -3),
            lambda x, n: torch.cat([torch.zeros(0), x], 0),
        ],
        random(3, 8),
        torch.arange(-8, 16).reshape(3, 8),
    )


def test_indices_along_one_dimension_move_none():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.ReflectionPad2d(2), torch.nn.Conv2d(4, 4, 3)
    )
    mod = prepare(load_model(torch.export.export(network.eval(), (random(1, 3, 6, 7),))).mod)
    names = [str(b.value.op.name) for b in mod["main"].body.blocks[0].bindings if hasattr(b.value, "op")]
    assert names.count("relax.permute_dims") == 2  # of the network's input and output


def test_images():
    grid = torch.rand(1, 5, 6, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
    check(
        [
            lambda x: F.adaptive_max_pool2d(x, 2),
            lambda x: F.avg_pool2d(x, 2, divisor_override=3),
            lambda x: F.interpolate(x, size=(13, 5)),
            lambda x: F.interpolate(x, scale_factor=2),
            lambda x: F.interpolate(x[..., :7, :7], scale_factor=1.5, mode="bilinear"),
            lambda x: F.interpolate(x, size=(13, 5), mode="bilinear"),
            lambda x: F.interpolate(x[0], size=13, mode="linear"),
            lambda x: F.unfold(x, 3, padding=1),
            lambda x: F.fold(F.unfold(x, 2, stride=2), (8, 8), 2, stride=2),
            lambda x: F.grid_sample(x, grid, align_corners=False),
            lambda x: F.affine_grid(x[:, 0, :2, :3], (1, 4, 5, 6), align_corners=False),
            lambda x: F.affine_grid(x[:, 0, :2, :3], (1, 4, 5, 6), align_corners=True),
        ],
        random(1, 4, 8, 8),
    )
    resize = Several([lambda x: F.interpolate(x, size=(4, 5), mode="bilinear", antialias=True)])
    with pytest.raises(UnsupportedOperatorError, match="antialias"):
        load_model(torch.export.export(resize, (random(1, 4, 8, 8),)))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_embeddings(mode):
    weight = random(6, 4)
    check([lambda i: F.embedding_bag(i, weight, mode=mode)], torch.tensor([[0, 5, 2], [1, 1, 3]]))
