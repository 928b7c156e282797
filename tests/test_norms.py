"""Norms and gated units in the forms that files hold: recognised, one row kernel each, equal to the NumPy twin."""

import numpy as np
import onnxruntime
import pytest
from models import model
from onnx import helper
from tvm import relax

import tvm_qfp8
from tvm_qfp8.importers import load_model
from tvm_qfp8.relay_passes.fuse import op_name
from tvm_qfp8.relay_passes.prepare import prepare
from tvm_qfp8.topi import reference

torch = pytest.importorskip("torch", reason="torch is an extra")

node = helper.make_node
RNG = np.random.default_rng(0)


def operators(mod) -> list[str]:
    found: list[str] = []
    relax.analysis.post_order_visit(prepare(mod)["main"], lambda e: found.append(op_name(e)))
    return [name for name in found if name]


def compare(module, inputs, expected, atol=1e-4):
    for ours, theirs in zip(module.run(inputs), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=atol)


class RMS(torch.nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form, self.weight = form, torch.nn.Parameter(torch.linspace(0.5, 1.5, 40))

    def forward(self, x):
        if self.form == "rsqrt":
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        if self.form == "sqrt":
            return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.weight
        return torch.nn.functional.rms_norm(x, (40,), self.weight, 1e-6)


@pytest.mark.parametrize("form", ["rsqrt", "sqrt", "functional"])
def test_rms_norm_of_torch(form):
    x = torch.randn(3, 5, 40)
    program = torch.export.export(RMS(form).eval(), (x,))
    assert "relax.nn.rms_norm" in operators(load_model(program).mod)
    module = tvm_qfp8.compile(program)
    (got,) = module.run({module.inputs[0].name: x.numpy()})
    np.testing.assert_allclose(got, RMS(form)(x).detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [1, 15, 16, 50, 384])
def test_rms_norm_is_its_twin_bit_for_bit(length):
    x = (RNG.standard_normal((7, length)) * 3).astype(np.float32)
    gamma = RNG.standard_normal(length).astype(np.float32)
    made = model(
        [node("RMSNormalization", ["x", "g"], ["y"], epsilon=1e-5)],
        {"x": (7, length)},
        {"y": (7, length)},
        {"g": gamma},
        23,
    )
    (got,) = tvm_qfp8.compile(made).run({"x": x})
    np.testing.assert_array_equal(got, reference.rms_norm(x, gamma, 1e-5))


@pytest.mark.parametrize("axis", [0, 2, -1])
def test_rms_norm_over_several_axes(axis):
    shape = (2, 3, 4, 5)
    gamma = RNG.standard_normal(shape[axis:]).astype(np.float32)
    made = model(
        [node("RMSNormalization", ["x", "g"], ["y"], axis=axis)], {"x": shape}, {"y": shape}, {"g": gamma}, 23
    )
    x = RNG.standard_normal(shape).astype(np.float32)
    axes = tuple(range(axis % 4, 4))
    expected = x / np.sqrt((x**2).mean(axes, keepdims=True) + 1e-5) * gamma
    compare(tvm_qfp8.compile(made), {"x": x}, [expected])


@pytest.mark.parametrize("kind", ["GroupNorm", "InstanceNorm", "LayerNorm2"])
def test_norms_of_torch(kind):
    layers = {
        "GroupNorm": torch.nn.GroupNorm(4, 8),
        "InstanceNorm": torch.nn.InstanceNorm2d(8, affine=True),
        "LayerNorm2": torch.nn.LayerNorm((7, 9)),
    }
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), layers[kind], torch.nn.SiLU()).eval()
    for parameter in layers[kind].parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 7, 9)
    program = torch.export.export(net, (x,))
    norm = "relax.nn.group_norm" if kind == "GroupNorm" else "relax.nn.layer_norm"
    assert norm in operators(load_model(program).mod)
    module = tvm_qfp8.compile(program)
    expected = net(x).detach().numpy()
    noise = module.run({module.inputs[0].name: x.numpy()})[0] - expected
    assert np.abs(noise).max() < 0.2


@pytest.mark.parametrize("kind", ["InstanceNormalization", "GroupNormalization"])
def test_norms_of_onnx(kind):
    shape, options = (2, 6, 5, 4), {"num_groups": 3} if kind.startswith("Group") else {}
    constants = {name: RNG.standard_normal(6).astype(np.float32) for name in ("g", "b")}
    made = model([node(kind, ["x", "g", "b"], ["y"], **options)], {"x": shape}, {"y": shape}, constants, 21)
    assert "relax.nn.layer_norm" in operators(load_model(made).mod)
    x = RNG.standard_normal(shape).astype(np.float32)
    session = onnxruntime.InferenceSession(made.SerializeToString())
    compare(tvm_qfp8.compile(made), {"x": x}, session.run(None, {"x": x}))


class Gated(torch.nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def forward(self, x):
        if self.gate is None:
            return torch.nn.functional.glu(x, -1)
        a, b = x.chunk(2, -1)
        return self.gate(a) * b


@pytest.mark.parametrize(
    "gate,function",
    [(None, "sigmoid"), (torch.nn.functional.silu, "silu"), (torch.nn.functional.gelu, "gelu")],
    ids=["GLU", "SwiGLU", "GeGLU"],
)
def test_gated_units(gate, function):
    x = torch.randn(4, 64)
    program = torch.export.export(Gated(gate), (x,))
    assert any(function in name for name in operators(load_model(program).mod))
    module = tvm_qfp8.compile(program)
    compare(module, {module.inputs[0].name: x.numpy()}, [Gated(gate)(x).numpy()], atol=5e-3)
