"""torch's LSTM, GRU and RNN, exported, against torch."""

import numpy as np
import pytest

import tvm_qfp8
from tvm_qfp8.calibration import evaluate
from tvm_qfp8.errors import UnsupportedOperatorError
from tvm_qfp8.importers import load_model
from tvm_qfp8.relay_passes.prepare import prepare

torch = pytest.importorskip("torch", reason="torch is an extra")
BATCH, STEPS, INPUT, HIDDEN = 3, 6, 10, 7


class Recurrent(torch.nn.Module):
    """A recurrent layer, all its results side by side."""

    def __init__(self, kind, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layer = getattr(torch.nn, kind)(INPUT, HIDDEN, **options)

    def forward(self, x, *states):
        outputs, last = self.layer(x, *states)
        return (outputs, *last) if isinstance(last, tuple) else (outputs, last)


CASES = [
    ("LSTM", {}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    ("LSTM", {"bias": False}),
    ("GRU", {"num_layers": 2, "bidirectional": True}),
    ("GRU", {"batch_first": True}),
    ("RNN", {"bidirectional": True}),
    ("RNN", {"nonlinearity": "relu"}),
]


@pytest.mark.parametrize("kind, options", CASES)
def test_like_torch(kind, options):
    network = Recurrent(kind, **options).eval()
    x = torch.randn(BATCH, STEPS, INPUT) if "batch_first" in options else torch.randn(STEPS, BATCH, INPUT)
    mod = prepare(load_model(torch.export.export(network, (x,))).mod)
    names = [step.op.name for block in mod["main"].body.blocks for step in calls(block)]
    directions = options.get("num_layers", 1) * (1 + ("bidirectional" in options))
    assert names.count("relax.qfp8.recurrent") == directions
    for ours, theirs in zip(evaluate(mod, {"x": x.numpy()}), network(x), strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-5)


def calls(block):
    return [binding.value for binding in block.bindings if hasattr(binding.value, "op")]


def test_open_batch_and_given_state():
    network = Recurrent("GRU", batch_first=True).eval()
    state = torch.randn(1, BATCH, HIDDEN)
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        network,
        (torch.randn(BATCH, STEPS, INPUT), (state)),
        dynamic_shapes={"x": {0: batch}, "states": ({1: batch},)},
    )
    names = list(load_model(program, input_shapes={"x": (2, STEPS, INPUT)}).input_names)
    x, state = torch.randn(2, STEPS, INPUT), torch.randn(1, 2, HIDDEN)
    module = tvm_qfp8.compile(program, input_shapes={"x": (2, STEPS, INPUT)})
    found = module.run(dict(zip(names, (x.numpy(), state.numpy()), strict=True)))
    for ours, theirs in zip(found, network(x, state), strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=0.02)


def test_projections_are_refused():
    program = torch.export.export(Recurrent("LSTM", proj_size=3).eval(), (torch.randn(STEPS, BATCH, INPUT),))
    with pytest.raises(UnsupportedOperatorError, match="proj_size"):
        load_model(program)
