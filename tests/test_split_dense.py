"""Dense layers whose result is taken apart become a layer for each part."""

import numpy as np
import pytest
from tvm import relax

import tvm_qfp8
from tvm_qfp8.calibration.evaluate import Program, evaluate
from tvm_qfp8.importers import load_model
from tvm_qfp8.relay_passes.fuse import op_name
from tvm_qfp8.relay_passes.prepare import prepare

torch = pytest.importorskip("torch", reason="torch is an extra")
RNG = np.random.default_rng(0)


class _Net(torch.nn.Module):
    """``apart(dense(x))`` with x (2, 10, 32) and 96 columns."""

    def __init__(self, apart, bias=True):
        super().__init__()
        self.dense, self.apart = torch.nn.Linear(32, 96, bias=bias), apart

    def forward(self, x):
        return self.apart(self.dense(x))


def _heads(y):
    return y.reshape(2, 10, 3, 4, 8).permute(2, 0, 3, 1, 4)


def _attention(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1), -1) @ v


def _behind_heads(y):
    q, k, v = y.reshape(2, 10, 4, 24).chunk(3, -1)  # columns of a part are apart from each other
    return q * k + v


PARTED = {
    "split": lambda y: torch.prod(torch.stack(y.chunk(3, -1)), 0),
    "sizes": lambda y: (lambda a, b, c: a[..., :16] * b + c[..., 16:32])(*y.split([24, 16, 56], -1)),
    "slices": lambda y: torch.sigmoid(y[..., :48]) * y[..., 48:],
    "negative": lambda y: torch.sigmoid(y[..., :-48]) * y[..., -48:],
    "unbind": lambda y: _attention(*_heads(y).unbind(0)),
    "places": lambda y: _attention(_heads(y)[0], _heads(y)[1], _heads(y)[-1]),
    "pairs": lambda y: _heads(y)[:2].sum(0) * _heads(y)[2],
    "no permutation": lambda y: y.reshape(2, 10, 3, 32)[:, :, 0] * y.reshape(2, 10, 3, 32)[:, :, 2],
}
KEPT = {
    "read whole, too": lambda y: torch.cat([y[..., :48] * y[..., 48:], y], -1),
    "a result, too": lambda y: (y.chunk(3, -1)[0] * y.chunk(3, -1)[1], y),
    "overlapping": lambda y: y[..., :64] * y[..., 32:],
    "narrow": lambda y: y[..., :90].sum(-1, keepdim=True) * y[..., 90:],
    "step": lambda y: y[..., ::2] * y[..., 1::2],
    "other axis": lambda y: y[:, :5] * y[:, 5:],
    "heads first": _behind_heads,
    "rows in the parts": lambda y: (lambda z: z[0] * z[1])(y.reshape(4, 5, 96)),
}


def _dense_layers(mod) -> list[tuple[int, ...]]:
    values = [binding.value for block in mod["main"].body.blocks for binding in block.bindings]
    matrices = [
        v.args[1] for v in values if op_name(v) == "relax.matmul" and not isinstance(v.args[1], relax.Var)
    ]
    return [tuple(int(extent) for extent in matrix.ty.shape) for matrix in matrices]


@pytest.mark.parametrize("way", ["export", "onnx"])
@pytest.mark.parametrize("name", [*PARTED, *KEPT])
def test_parts_compute_the_same(name, way, tmp_path):
    net = _Net((PARTED | KEPT)[name], bias=name != "slices").eval()
    x = torch.tensor(RNG.standard_normal((2, 10, 32)).astype("float32"))
    if way == "export":
        model = torch.export.export(net, (x,))
    else:
        model = tmp_path / "net.onnx"
        torch.onnx.export(net, (x,), model, dynamo=False, input_names=["x"])
    mod = prepare(load_model(model).mod)
    found, *_ = evaluate(mod, {next(iter(Program(mod).inputs)): x.numpy()})
    expected = net(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-5)
    shapes = _dense_layers(mod)
    if name in KEPT:
        assert shapes == [(32, 96)]
    else:
        assert len(shapes) >= 2 and all(columns < 96 for _, columns in shapes)


def test_parts_are_encoded_where_they_are_computed():
    net = _Net(PARTED["unbind"]).eval()
    x = torch.tensor(RNG.standard_normal((2, 10, 32)).astype("float32"))
    samples = [{"x": RNG.standard_normal((2, 10, 32)).astype("float32")} for _ in range(8)]
    module = tvm_qfp8.compile(torch.export.export(net, (x,)), calibration=samples)
    names = [layer.name for layer in module.report.layers if layer.operator == "matmul"]
    assert names[:3] == ["dense_0", "dense_1", "dense_2"]
    (found,) = module.run({"x": x.numpy()})
    exact = net(x).detach().numpy()
    assert np.square(found - exact).sum() < 1e-2 * np.square(exact).sum()
