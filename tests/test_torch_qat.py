"""Quantization-aware training: the rounding, its gradients, and compiled modules equal to trained ones."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is an extra")

from torch import nn  # noqa: E402

import tvm_qfp8 as q  # noqa: E402
from tvm_qfp8.errors import CalibrationError, InputError, ModelError  # noqa: E402
from tvm_qfp8.format import LAYOUTS  # noqa: E402
from tvm_qfp8.torch.fake_quantize import fake_quantize  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Net(nn.Module):
    """Every layer that is trained, with BatchNorm behind, beside and far from it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.grouped = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.norm = nn.BatchNorm2d(6, affine=False)
        self.table = nn.Embedding(5, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x, index):
        x = self.stem(x)
        x = self.norm(self.up(x + self.grouped(x)))
        return self.head(x.flatten(2).transpose(1, 2) + self.table(index)[:, None])


def _inputs(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 1, 8, 8, generator=generator), torch.randint(0, 5, (4,), generator=generator)


def _trained(**options):
    """A prepared model after two steps of training, in eval mode."""
    torch.manual_seed(0)
    model = Net()
    for seed in range(4):
        model(*_inputs(seed))  # BatchNorm's statistics
    with torch.no_grad():
        model.stem[1].weight.copy_(torch.linspace(-1, 1, 8))
    batches = None if options.pop("weights_only", False) else [_inputs(seed) for seed in range(2)]
    q.torch.prepare_qat(model, q.torch.QATConfig(**options), batches=batches)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for seed in range(2):
        optimizer.zero_grad()
        model(*_inputs(seed)).square().mean().backward()
        optimizer.step()
    return model.eval()


def _compiled(model):
    module = q.compile(torch.export.export(model, _inputs(0)))
    return lambda x, index: torch.from_numpy(module(x.numpy(), index.numpy())[0]), module


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rounding_has_the_bits_of_the_format(layout):
    ties = torch.arange(2000) / 2
    x = torch.cat([ties, -ties, 1000 * torch.randn(5000, generator=torch.Generator().manual_seed(0))]) * 0.37
    for scale in (0.37, 0.011, 2.0**-7):
        expected = q.decode(q.encode(x.numpy(), scale, layout), scale, layout)
        np.testing.assert_array_equal(fake_quantize(x, torch.tensor(scale), layout).numpy(), expected)
    scales = torch.tensor([0.5, 0.01, 0.3])
    found = fake_quantize(x.reshape(50, 3, -1), scales, layout, 1).numpy()
    codes = q.encode(x.reshape(50, 3, -1).numpy(), scales.numpy(), layout, 1)
    np.testing.assert_array_equal(found, q.decode(codes, scales.numpy(), layout, 1))


def test_gradients_pass_straight_through_and_move_the_scale():
    x = torch.tensor([0.3, 5.0, -1e4, 1e4, 260.0]).requires_grad_()
    scale = torch.tensor(1.0).requires_grad_()
    grad = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    fake_quantize(x, scale, "E2M5").backward(grad)
    assert x.grad.tolist() == [1.0, 2.0, 0.0, 0.0, 0.0]
    # Inside, rounded minus exact steps; beyond the reach, the largest grid value.
    expected = -0.3 * 1 + 0.0 * 2 - 252 * 3 + 252 * 4 + 252 * 5
    assert scale.grad.item() == pytest.approx(expected, rel=1e-6)


def test_operator_keeps_torchs_rules():
    x = torch.randn(4, 3, requires_grad=True)
    scale = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    torch.library.opcheck(torch.ops.tvm_qfp8.fake_quantize.default, (x, scale, "E2M5", 1))


@pytest.mark.parametrize("options", [{}, {"bias": "learned"}, {"per_channel": False, "activations": "E3M4"}])
def test_compiled_equals_trained_to_the_bit(options):
    model = _trained(**options)
    run, module = _compiled(model)
    for seed in (0, 7):
        with torch.no_grad():
            assert torch.equal(run(*_inputs(seed)), model(*_inputs(seed)))
    kinds = [(layer.operator, layer.became) for layer in module.report.layers if layer.weight_layout]
    assert kinds == [
        *[("conv2d", "QFP8")] * 2,
        ("conv2d_transpose", "QFP8"),
        ("take", "QFP8 table"),
        ("matmul", "QFP8"),
    ]
    assert "quantization-aware training" in str(module.report)


def test_batchnorm_is_folded_to_the_bit():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 128, 3), nn.BatchNorm2d(128), nn.Flatten(), nn.Linear(512, 64), nn.BatchNorm1d(64)
    )
    x = torch.randn(5, 3, 4, 4)
    with torch.no_grad():
        for _ in range(3):
            model(3 * torch.randn(64, 3, 4, 4))
    q.torch.prepare_qat(model, batches=[x])
    for part in (model[:2], model):
        (found,) = q.compile(torch.export.export(part.eval(), (x,)))(x.numpy())
        with torch.no_grad():
            np.testing.assert_array_equal(found, part(x).numpy())


def test_with_gradients_the_arithmetic_differs_by_rounding_only():
    model = _trained()
    with torch.no_grad():
        exact = model(*_inputs(1))
    # A value on the border of two codes may fall to the other one.
    assert (model(*_inputs(1)) - exact).abs().max() < 0.02 * exact.abs().max()


def test_weights_only_and_skipped_layers():
    model = _trained(weights_only=True, skip=("head", "stem.*"))
    assert type(model.head) is nn.Linear and type(model.stem[0]) is nn.Conv2d
    run, module = _compiled(model)
    became = {layer.operator: layer.became for layer in module.report.layers}
    assert became["conv2d_transpose"] == "QFP8 weights" and became["matmul"] == "float32"
    with torch.no_grad():
        torch.testing.assert_close(run(*_inputs(3)), model(*_inputs(3)), atol=2e-5, rtol=1e-4)


def test_batchnorm_of_a_model_that_cannot_be_traced_stays():
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.norm(self.conv(x))
            return y if bool((y.detach() == y.detach()).all()) or torch.compiler.is_exporting() else -y

    model = Untraceable()
    x = torch.randn(4, 1, 8, 8)
    q.torch.prepare_qat(model, batches=[x])
    assert model.conv.norm is None and isinstance(model.norm, nn.BatchNorm2d)


def test_batchnorm_is_recalibrated_behind_rounded_layers():
    model = _trained()
    batches = [_inputs(seed) for seed in range(6)]
    norm = model.stem[0].norm
    with torch.no_grad():
        norm.running_var.mul_(0.2)
    before = norm.running_var.clone()
    done = q.torch.recalibrate_batchnorm(model, batches)
    assert done.layers == 3 and not done.kept_old
    assert (norm.running_var > before).all()
    run, _ = _compiled(model)
    with torch.no_grad():
        assert torch.equal(run(*_inputs(0)), model(*_inputs(0)))


def test_transformer_layers_call_what_is_prepared():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 2)
    x = torch.randn(3, 5, 16)
    found = q.torch.prepare_qat(model, batches=[x])
    assert found["layers.0.linear1"].startswith("E2M5, input ") and "layers.0.self_attn.out_proj" not in found
    exact = model.eval()(x)
    with torch.no_grad():
        assert 0 < (model(x) - exact).abs().max() < 0.05
        module = q.compile(torch.export.export(model, (x,)))
        torch.testing.assert_close(torch.from_numpy(module(x.numpy())[0]), model(x), atol=0.03, rtol=0)
    became = [layer.became for layer in module.report.layers if layer.operator == "matmul"]
    assert became.count("QFP8") == 4


def test_state_dict_round_trip_and_copies():
    model = _trained(bias="learned")
    again = Net()
    q.torch.prepare_qat(again, q.torch.QATConfig(bias="learned"))
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        expected = model(*_inputs(5))
        assert torch.equal(again.eval()(*_inputs(5)), expected)
        assert torch.equal(copy.deepcopy(model)(*_inputs(5)), expected)


@pytest.mark.parametrize("bias", ["tracked", "learned"])
def test_scales_follow_the_tensors(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8))
    q.torch.prepare_qat(model, q.torch.QATConfig(bias=bias), batches=[torch.randn(64, 64)])
    layer, x = model[0].train(), 4 * torch.randn(64, 64)
    with torch.no_grad():
        layer.weight.mul_(4)
    quantizers = ((layer.weight_quantizer, layer.weight, 0), (layer.input_quantizer, x, None))
    before = [_rounding_error(part, tensor) for part, tensor, _ in quantizers]
    learned = [part.bias for part, _, _ in quantizers if bias == "learned"]
    optimizer = torch.optim.Adam(learned, 0.1) if learned else None
    for _ in range(60):
        model(x)
        if optimizer is not None:
            optimizer.zero_grad()
            sum(
                (part(tensor.detach()) - tensor.detach()).square().sum() for part, tensor, _ in quantizers
            ).backward()
            optimizer.step()
    for (quantizer, tensor, axis), error in zip(quantizers, before, strict=True):
        array = tensor.detach().numpy()
        best = np.square(q.quantize(array, axis=axis, layout=quantizer.layout).dequantize() - array).sum()
        found = _rounding_error(quantizer.eval(), tensor)
        assert found < 0.01 * error
        assert found <= (1.3 if bias == "tracked" else 4) * best


def _rounding_error(quantizer, tensor) -> float:
    rounded = fake_quantize(tensor.detach(), quantizer.scale, quantizer.layout, quantizer.axis)
    return float((rounded - tensor.detach()).square().sum())


def test_mixed_precision_and_torch_compile():
    model = _trained().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*_inputs(2)).float().square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    again = copy.deepcopy(model)
    traced = torch.compile(again, backend="aot_eager", fullgraph=True)
    for part in (model, traced):
        part(*_inputs(2)).square().mean().backward()
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="no sign"):
        q.torch.prepare_qat(Net(), q.torch.QATConfig(weights="UE2M6"))
    with pytest.raises(InputError, match="'tracked' and 'learned'"):
        q.torch.prepare_qat(Net(), q.torch.QATConfig(bias="fixed"))
    with pytest.raises(CalibrationError, match="no batches"):
        q.torch.prepare_qat(Net(), batches=[])
    damaged = Net()
    with torch.no_grad():
        damaged.head.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="weight of head holds NaN"):
        q.torch.prepare_qat(damaged)
    assert type(damaged.stem[0]) is nn.Conv2d and type(damaged.stem[2]) is nn.SiLU
    program = torch.export.export(_trained(), _inputs(0))
    with pytest.raises(CalibrationError, match="give no calibration data"):
        q.compile(program, calibration=[{"x": np.zeros((4, 1, 8, 8), np.float32)}])
    with pytest.warns(UserWarning, match="not compiled"):
        model = _trained(weights="E4M3", activations="E4M3")
    with pytest.raises(ModelError, match="trained in E4M3"):
        q.compile(torch.export.export(model, _inputs(0)))
