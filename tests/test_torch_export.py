"""torch.export programs, imported."""

import numpy as np
import pytest
from tvm import relax

from tvm_qfp8.calibration import evaluate
from tvm_qfp8.errors import ModelError
from tvm_qfp8.importers import load_model
from tvm_qfp8.relay_passes.prepare import prepare


def test_torch_export():
    torch = pytest.importorskip("torch", reason="torch is an extra")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
            self.norm = torch.nn.BatchNorm2d(8)
            self.dense = torch.nn.Linear(8, 16)
            self.layer_norm = torch.nn.LayerNorm(16)

        def forward(self, x):
            x = torch.nn.functional.silu(self.norm(self.conv(x)))
            x = torch.nn.functional.max_pool2d(x, 2).flatten(2).transpose(1, 2)
            x = self.layer_norm(torch.nn.functional.gelu(self.dense(x)))
            return torch.softmax(x + torch.nn.functional.scaled_dot_product_attention(x, x, x), -1)

    torch.manual_seed(0)
    net = Net().eval()
    x = torch.randn(1, 3, 8, 8)
    imported = load_model(torch.export.export(net, (x,)))
    with torch.no_grad():
        expected = net(x).numpy()
    name = imported.input_names[0]
    np.testing.assert_allclose(
        evaluate(prepare(imported.mod), {name: x.numpy()})[0], expected, rtol=1e-3, atol=1e-5
    )
    with pytest.raises(ModelError, match=r"torch\.export\.export"):
        load_model(net.conv)


def test_torch_with_open_dimensions_and_bad_weights():
    torch = pytest.importorskip("torch", reason="torch is an extra")
    net = torch.nn.Linear(4, 3).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (torch.zeros(2, 4),), dynamic_shapes=({0: batch},))
    name = load_model(program, input_shapes={"input": (5, 4)}).input_names[0]
    assert name == "input"
    with pytest.raises(ModelError, match="'input' has open dimensions"):
        load_model(program)
    net.weight.data[1, 2] = float("inf")
    with pytest.raises(ModelError, match=r"'weight' is inf at index \(1, 2\)"):
        load_model(torch.export.export(net, (torch.zeros(2, 4),)))


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float64"])
def test_torch_in_other_precisions_becomes_float32(precision):
    torch = pytest.importorskip("torch", reason="torch is an extra")
    dtype = getattr(torch, precision)

    class Masked(torch.nn.Module):
        """Weights, a buffer, a constant and values made inside, with the casts of language models."""

        def __init__(self):
            super().__init__()
            self.dense = torch.nn.Linear(8, 8)
            self.register_buffer("shift", torch.arange(8.0))
            self.factor = torch.full((8,), 0.5, dtype=dtype)

        def forward(self, x, steps):
            length = x.shape[1]
            mask = torch.full((length, length), -1e4, dtype=x.dtype).triu(1)
            y = self.dense(x).float()
            y = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
            y = y * self.factor.to(x.dtype) + self.shift
            return torch.softmax(y @ y.transpose(1, 2) + mask, -1, dtype=torch.float32).to(x.dtype), steps * 2

    torch.manual_seed(0)
    net, x, steps = Masked().eval(), torch.randn(2, 4, 8), torch.arange(3)
    for parameter in net.parameters():  # what every precision can hold
        parameter.data = parameter.data.to(torch.bfloat16).float()
    x = x.to(torch.bfloat16).float()
    expected = net(x, steps)[0].detach().numpy()
    net = net.to(dtype)
    for shapes in (None, ({0: torch.export.Dim.AUTO}, None)):
        program = torch.export.export(net, (x.to(dtype), steps), dynamic_shapes=shapes)
        imported = load_model(program, input_shapes=None if shapes is None else {"x": (2, 4, 8)})
        assert imported.notes == [f"{precision} became float32, inputs and outputs too"]
        found, doubled = evaluate(prepare(imported.mod), {"x": x.numpy(), "steps": steps.numpy()})
        assert (found.dtype, doubled.dtype) == (np.float32, np.int64)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        assert net.dense.weight.dtype == program.state_dict["dense.weight"].dtype == dtype


def test_standardised_weights_are_constants():
    """Convolutions that standardise their weights at each call, as NFNet and BiT do."""
    torch = pytest.importorskip("torch", reason="torch is an extra")

    class Standardized(torch.nn.Conv2d):
        def forward(self, x):
            rows = self.weight.reshape(1, self.out_channels, -1)
            scale = torch.full((self.out_channels,), 0.2)
            rows = torch.nn.functional.batch_norm(rows, None, None, scale, training=True, eps=1e-6)
            return torch.nn.functional.conv2d(x, rows.reshape_as(self.weight), self.bias, padding=1)

    torch.manual_seed(0)
    net = torch.nn.Sequential(Standardized(8, 8, 3), torch.nn.ReLU(), Standardized(8, 8, 3)).eval()
    x = torch.randn(1, 8, 9, 9)
    mod = prepare(load_model(torch.export.export(net, (x,))).mod)
    layouts = []

    def visit(call):
        if str(getattr(getattr(call, "op", None), "name", "")) == "relax.nn.conv2d":
            layouts.append((str(call.attrs.data_layout), type(call.args[1]).__name__))

    relax.analysis.post_order_visit(mod["main"], visit)
    assert layouts == [("NHWC", "GenericConst")] * 2
    (parameter,) = mod["main"].params
    (got,) = evaluate(mod, {parameter.name: x.numpy()})
    np.testing.assert_allclose(got, net(x).detach().numpy(), rtol=1e-4, atol=1e-5)
