"""Interpolated activation layers in torch: values, gradients, tracers, whole models."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys

import pytest

torch = pytest.importorskip("torch", reason="torch is an extra")

from torch import nn  # noqa: E402

import tvm_qfp8 as q  # noqa: E402
from tvm_qfp8.errors import InputError, MissingPackageError, TableError  # noqa: E402

LAYERS = {
    "GELU": (),
    "GELU_tanh": ("tanh",),
    "SiLU": (),
    "Mish": (),
    "Sigmoid": (),
    "Tanh": (),
    "Softplus": (2.0,),
    "ELU": (0.5,),
    "SELU": (),
    "CELU": (1.3,),
    "Hardswish": (),
    "Hardsigmoid": (),
}
ROUNDING = 1e-6


def _pair(name: str, max_error: float):
    kind = name.removesuffix("_tanh")
    return getattr(q.torch, kind)(*LAYERS[name], max_error=max_error), getattr(nn, kind)(*LAYERS[name])


def _exact(layer, x, grad):
    """Value and gradient in float64."""
    x = x.detach().double().requires_grad_()
    y = layer(x)
    return y.detach(), torch.autograd.grad(y, x, grad.double())[0]


def _within(found, expected, bound: float, factor=1.0) -> bool:
    limit = (bound + ROUNDING) * factor * torch.clamp(expected.abs(), min=1.0)
    return bool(((found.double() - expected).abs() <= limit).all())


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_within_the_bound(name):
    max_error = 1e-3
    ours, exact = _pair(name, max_error)
    x = torch.linspace(-12, 12, 4001).requires_grad_()
    y, slope = _exact(exact, x, torch.ones_like(x))
    found = ours(x)
    found.sum().backward()
    assert _within(found.detach(), y, max_error)
    assert _within(x.grad, slope, max_error)


def _views():
    base = torch.randn(4, 6, 10, 9, generator=torch.Generator().manual_seed(0)) * 3
    return {
        "channels last": base.to(memory_format=torch.channels_last),
        "transposed": base.transpose(0, 2),
        "with gaps": base[..., ::2],
        "not aligned": base.reshape(-1)[1:],
        "expanded": base[:1].expand(3, -1, -1, -1),
        "scalar": base[0, 0, 0, 0],
        "empty": base[:0],
    }


@pytest.mark.parametrize("view", _views())
def test_any_strides(view):
    x = _views()[view].detach().requires_grad_()
    y = q.torch.functional.gelu(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(grad)
    expected, slope = _exact(nn.GELU(), x, grad)
    assert _within(y.detach(), expected, 1e-3)
    assert ((x.grad.double() - slope).abs() <= (1.2e-3 + ROUNDING) * grad.abs()).all()


def test_bfloat16_rounds_once():
    x = (torch.randn(1000) * 3).bfloat16().requires_grad_()
    grad = torch.randn(1000).bfloat16()
    y = q.torch.functional.silu(x)
    y.backward(grad)
    wide = x.detach().float().requires_grad_()
    z = q.torch.functional.silu(wide)
    z.backward(grad.float())
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert torch.equal(y, z.bfloat16()) and torch.equal(x.grad, wide.grad.bfloat16())


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_softmax(dim, dtype):
    x = (torch.randn(5, 7, 33) * 4).to(getattr(torch, dtype)).requires_grad_()
    grad = torch.randn(5, 7, 33).to(x.dtype)
    y = q.torch.functional.softmax(x, dim)
    y.backward(grad)
    expected, slope = _exact(nn.Softmax(dim), x, grad)
    rounding = 0.0 if x.dtype == torch.float32 else 2.0**-8
    assert (y.double() - expected).abs().max() <= 1e-3 + rounding
    # p (g - sum g p): each probability's error counts once itself, once in the sum over the row.
    reach = grad.abs().double().sum(dim, keepdim=True)
    assert ((x.grad.double() - slope).abs() <= 2.1 * (1e-3 + rounding) * reach).all()


def test_threads_give_the_same_bits():
    x = torch.randn(200_001)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = q.torch.functional.mish(x), q.torch.functional.softmax(x[1:].view(400, 500))
        torch.set_num_threads(2)
        two = q.torch.functional.mish(x), q.torch.functional.softmax(x[1:].view(400, 500))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("operator", ["interpolate", "interpolate_backward", "softmax"])
def test_operators_keep_torchs_rules(operator):
    x = torch.randn(6, 5, requires_grad=operator != "interpolate_backward")
    arguments = {
        "interpolate": (x, "gelu", 1e-3),
        "interpolate_backward": (torch.randn(6, 5), x, "gelu", 1e-3),
        "softmax": (x, 1e-3),
    }[operator]
    torch.library.opcheck(getattr(torch.ops.tvm_qfp8, operator).default, arguments)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(8, 16), q.torch.GELU(), nn.Linear(16, 4)
        self.out = q.torch.Softmax(-1)

    def forward(self, x):
        return self.out(self.second(self.act(self.first(x))))


def test_torch_compile_traces_without_breaks():
    model = _Block()
    traced = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 8)
    traced(x).pow(2).sum().backward()
    traced_grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    y = model(x)
    y.pow(2).sum().backward()
    assert torch.equal(traced(x), y)
    for found, parameter in zip(traced_grads, model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad)


def test_exported_programs_hold_torchs_own_operators():
    program = torch.export.export(_Block().eval(), (torch.randn(3, 8),))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"aten.gelu.default", "aten.softmax.int"} <= targets
    x = torch.randn(3, 8)
    (y,) = q.compile(program)(x.numpy())
    torch.testing.assert_close(torch.from_numpy(y), program.module()(x), atol=0.05, rtol=0)


def test_layers_stand_in_for_torchs():
    layer = q.torch.GELU("tanh", max_error=1e-2)
    assert isinstance(layer, nn.GELU)
    assert repr(layer) == "GELU(approximate='tanh', max_error=0.01)"
    x = torch.randn(9)
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(x), layer(x))
    assert not layer.state_dict()


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = nn.SiLU(inplace=True)
        self.body = nn.Sequential(nn.Linear(8, 8), shared, nn.Linear(8, 8), shared, nn.PReLU())
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)

    def forward(self, x):
        return self.encoder(self.body(x))


@pytest.mark.parametrize("training", [False, True])
def test_replace_activations_swaps_a_whole_model(training):
    model = _Net().train(training)
    model.encoder.dropout.p = model.encoder.dropout1.p = model.encoder.dropout2.p = 0.0
    model.encoder.self_attn.dropout = 0.0
    exact, weights = copy.deepcopy(model), model.state_dict()
    calls = []
    model.body[1].register_forward_hook(lambda *_: calls.append(1))
    swapped = q.torch.replace_activations(model, max_error=1e-2)
    assert swapped == {"body.1": "SiLU", "encoder.activation": "gelu"}
    assert model.state_dict().keys() == weights.keys()
    assert q.torch.replace_activations(model) == {}
    x = torch.randn(2, 5, 8)
    difference = (model(x) - exact(x)).abs().max()
    assert 1e-6 < difference < 0.2
    assert len(calls) == 2


def test_nothing_is_swapped_where_a_layer_is_impossible():
    model = nn.Sequential(nn.GELU(), nn.Softplus(threshold=1.0), nn.Softmax(2))
    with pytest.raises(InputError, match="threshold"):
        q.torch.replace_activations(model)
    with pytest.raises(TableError, match="mish: no table"):
        q.torch.replace_activations(nn.Sequential(nn.GELU(), nn.Mish()), max_error=1e-6)
    assert [type(layer) for layer in model] == [nn.GELU, nn.Softplus, nn.Softmax]


def test_a_layer_alone_is_swapped():
    layer = nn.ELU(0.5)
    assert q.torch.replace_activations(layer) == {"": "ELU"}
    assert type(layer) is q.torch.ELU and layer.alpha == 0.5


def test_what_no_kernel_takes_is_refused():
    with pytest.raises(InputError, match="float64 on cpu; it takes float32"):
        q.torch.functional.gelu(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(InputError, match="threshold"):
        q.torch.functional.softplus(torch.zeros(3), 1.0, 2.0)
    with pytest.raises(InputError, match="approximate"):
        q.torch.functional.gelu(torch.zeros(3), "sigmoid")


def test_other_devices_run_torchs_own_functions():
    x = torch.zeros(3, 4, device="meta", dtype=torch.float16)
    for layer in (q.torch.GELU(), q.torch.Softplus(3.0), q.torch.Softmax(0), q.torch.Hardswish()):
        assert layer(x).shape == (3, 4)


def test_second_derivatives_are_refused():
    x = torch.randn(3, requires_grad=True)
    for layer in (q.torch.Tanh(), q.torch.Softmax(-1)):
        with pytest.raises(InputError, match="create_graph"):
            torch.autograd.grad(layer(x)[0], x, create_graph=True)


def test_missing_torch_is_named(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("tvm_qfp8.torch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'tvm-qfp8\[torch\]'"):
        importlib.import_module("tvm_qfp8.torch")
