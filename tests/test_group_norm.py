"""GroupNorm and InstanceNorm between convolutions stay in the layout of these, from torch's programs and from files."""

import io

import numpy as np
import onnx
import pytest
from models import model
from onnx import helper
from test_norms import operators

import tvm_qfp8
from tvm_qfp8.calibration import evaluate
from tvm_qfp8.importers import load_model
from tvm_qfp8.relay_passes.prepare import prepare

torch = pytest.importorskip("torch", reason="torch is an extra")
nn = torch.nn

NORMS = {
    "instance norm": lambda: nn.InstanceNorm2d(12, affine=True),
    "instance norm without scales": lambda: nn.InstanceNorm2d(12),
    "one group": lambda: nn.GroupNorm(1, 12),
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
    assert names.count("relax.nn.layer_norm") == 1
    (parameter,) = mod["main"].params
    (got,) = evaluate(prepare(mod), {parameter.name: x.numpy()})
    np.testing.assert_allclose(got, network(x).detach().numpy(), rtol=1e-4, atol=1e-4)


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
