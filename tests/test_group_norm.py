"""GroupNorm and InstanceNorm: between convolutions in the layout of these, from torch's programs and from files."""

import io

import numpy as np
import onnx
import pytest
from models import model
from onnx import helper
from quantized_programs import TARGETS, build, machine_runs, program, run
from test_norms import operators
from tvm import relax

import tvm_qfp8
from tvm_qfp8.calibration import evaluate
from tvm_qfp8.importers import load_model
from tvm_qfp8.relay_passes.prepare import prepare
from tvm_qfp8.topi import reference

torch = pytest.importorskip("torch", reason="torch is an extra")
nn = torch.nn

NORMS = {
    "instance norm": lambda: nn.InstanceNorm2d(12, affine=True),
    "instance norm without scales": lambda: nn.InstanceNorm2d(12),
    "one group": lambda: nn.GroupNorm(1, 12),
    "groups": lambda: nn.GroupNorm(4, 12),
    "groups without scales": lambda: nn.GroupNorm(3, 12, affine=False),
}


class Network(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 12, 3), norm, nn.Conv2d(12, 5, 3)
        if getattr(norm, "weight", None) is not None:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu())


def source(network, x, form):
    if form == "program":
        return torch.export.export(network, (x,))
    file = io.BytesIO()
    torch.onnx.export(network, (x,), file, dynamo=False)
    return onnx.load_from_string(file.getvalue())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("form", ["program", "file"])
@pytest.mark.parametrize("name", NORMS)
def test_channels_stay_last(name, form):
    torch.manual_seed(0)
    network, x = Network(NORMS[name]()).eval(), torch.randn(1, 3, 9, 10)
    mod = load_model(source(network, x, form)).mod
    names = operators(mod)
    convolutions = [place for place, found in enumerate(names) if found == "relax.nn.conv2d"]
    assert "relax.permute_dims" not in names[convolutions[0] : convolutions[-1]]
    assert names.count("relax.nn.layer_norm" if name == "one group" else "relax.nn.group_norm") == 1
    (parameter,) = mod["main"].params
    (got,) = evaluate(prepare(mod), {parameter.name: x.numpy()})
    np.testing.assert_allclose(got, network(x).detach().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("form", ["program", "file"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_norm_of_sounds_follows_its_convolution(bias, form):
    torch.manual_seed(0)
    norm = nn.GroupNorm(12, 12)
    network = nn.Sequential(nn.Conv1d(2, 12, 5, 2, bias=bias), norm, nn.GELU(), nn.Conv1d(12, 4, 3)).eval()
    nn.init.normal_(norm.weight)
    x = torch.randn(1, 2, 70)
    mod = load_model(source(network, x, form)).mod
    names = operators(mod)
    convolutions = [place for place, found in enumerate(names) if found == "relax.nn.conv2d"]
    assert "relax.permute_dims" not in names[convolutions[0] : convolutions[-1]]
    assert names.count("relax.nn.group_norm") == 1
    (parameter,) = mod["main"].params
    (got,) = evaluate(prepare(mod), {parameter.name: x.numpy()})
    np.testing.assert_allclose(got, network(x).detach().numpy(), rtol=1e-4, atol=1e-4)


SHAPES = {
    "vectors": ((2, 19, 21, 64), 2),
    "parts of vectors": ((1, 13, 10, 32), 8),
    "groups across vectors": ((1, 5, 7, 80), 8),
    "several blocks": ((1, 6, 5, 320), 20),
    "no whole vector": ((3, 4, 9, 15), 3),
    "vectors and a rest": ((1, 3, 3, 44), 2),
    "a channel each": ((2, 17, 5, 23), 23),
    "a pixel": ((1, 1, 1, 24), 4),
    "many pixels": ((1, 40, 41, 16), 4),
}


def norm(shape, groups):
    """A program of GroupNorm, and of a residual after it in the same kernel."""
    ones, zeros = relax.const(np.ones(shape[-1], np.float32)), relax.const(np.zeros(shape[-1], np.float32))

    def body(builder, x):
        y = relax.op.nn.group_norm(x, ones, zeros, groups, 3, [1, 2], 1e-5, center=False, scale=False)
        return relax.op.add(builder.emit(y), x)

    return program([(shape, None)], body)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("target", TARGETS)
def test_groups_follow_the_contract(target, name):
    if not machine_runs(target):
        pytest.skip(f"this CPU does not run {target}")
    shape, groups = SHAPES[name]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * 3 + 1
    expected = reference.group_norm(x, groups, 1e-5) + x
    (got,) = run(build(norm(shape, groups), TARGETS[target], threads=2), x)
    assert np.array_equal(got, expected)
    exact = nn.functional.group_norm(torch.tensor(x.transpose(0, 3, 1, 2)).double(), groups)
    np.testing.assert_allclose(expected - x, exact.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-4)


def test_not_a_number_spoils_its_group_alone():
    shape, groups = SHAPES["groups across vectors"]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x[0, 2, 3, 11] = np.nan
    (got,) = run(build(norm(shape, groups), "native", threads=1), x)
    assert np.isnan(got[..., 10:20]).all()
    assert np.isfinite(got[..., :10]).all() and np.isfinite(got[..., 20:]).all()


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_compiled_between_convolutions(groups):
    torch.manual_seed(0)
    network, x = Network(nn.GroupNorm(groups, 12)).eval(), torch.randn(1, 3, 9, 10)
    config = tvm_qfp8.Config(skip=["*"])
    module = tvm_qfp8.compile(torch.export.export(network, (x,)), config=config)
    (got,) = module.run({module.inputs[0].name: x.numpy()})
    np.testing.assert_allclose(got, network(x).detach().numpy(), rtol=1e-4, atol=1e-4)


def test_rows_that_hold_no_whole_channels_are_no_group_norm():
    shapes = {"rows": np.array([1, 12, 8]), "back": np.array([1, 4, 6, 4])}
    ones = {"ones": np.ones(8, np.float32), "zeros": np.zeros(8, np.float32)}
    nodes = [
        helper.make_node("Reshape", ["x", "rows"], ["r"]),
        helper.make_node("LayerNormalization", ["r", "ones", "zeros"], ["n"]),
        helper.make_node("Reshape", ["n", "back"], ["y"]),
    ]
    made = model(nodes, {"x": (1, 4, 6, 4)}, {"y": (1, 4, 6, 4)}, {**shapes, **ones}, 17)
    x = np.random.default_rng(0).standard_normal((1, 4, 6, 4)).astype(np.float32)
    (got,) = tvm_qfp8.compile(made).run({"x": x})
    rows = x.reshape(1, 12, 8)
    expected = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(got, expected.reshape(x.shape), rtol=1e-4, atol=1e-5)
