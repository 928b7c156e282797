"""L2 normalisation, log-softmax, gated units and norms in the forms of ONNX and torch.export: one kernel, reported."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from models import model
from onnx import helper
from test_norms import operators

import tvm_qfp8
from tvm_qfp8.importers import load_model

torch = pytest.importorskip("torch", reason="torch is an extra")

F = torch.nn.functional
node = helper.make_node
RNG = np.random.default_rng(0)
SHAPE = (4, 6, 50)
L2, LOG_SOFTMAX = "relax.qfp8.l2_normalize", "relax.nn.log_softmax"
ROW_KERNEL = "fused row kernel"


class Applied(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def check(made, x, expected, operator, became=ROW_KERNEL, atol=1e-3):
    """The model holds ``operator``, the report says what it became, results agree."""
    assert operator in operators(load_model(made).mod)
    module = tvm_qfp8.compile(made)
    assert any(layer.became.startswith(became) for layer in module.report.layers), module.report.to_text()
    (got,) = module.run({module.inputs[0].name: x})
    np.testing.assert_allclose(got, expected, atol=atol)


TORCH = {
    "normalize": (F.normalize, dict(dim=-1), L2),
    "vector norm": (lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True), {}, L2),
    "by hand": (lambda x: x / torch.sqrt((x * x).sum(-1, keepdim=True)), {}, L2),
    "clamped": (lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6), {}, L2),
    "log_softmax": (F.log_softmax, dict(dim=-1), LOG_SOFTMAX),
    "log of softmax": (lambda x: torch.log(torch.softmax(x, -1)), {}, LOG_SOFTMAX),
    "logsumexp": (lambda x: x - torch.logsumexp(x, -1, keepdim=True), {}, LOG_SOFTMAX),
    "group norm without scale": (lambda x: F.group_norm(x, 3), {}, "relax.nn.layer_norm"),
}


def some_slow(forms):
    """Several forms of one layer whose kernel takes seconds to compile: all but the first are slow."""
    slow = {"log of softmax", "logsumexp", "Softmax, Log", "ReduceLogSumExp"}
    return [pytest.param(form, marks=[pytest.mark.slow] if form in slow else []) for form in forms]


@pytest.mark.parametrize("form", some_slow(TORCH))
def test_forms_of_torch(form):
    function, options, operator = TORCH[form]
    net, x = Applied(lambda x: function(x, **options)), torch.randn(SHAPE)
    program = torch.export.export(net, (x,))
    assert operator in operators(load_model(program.run_decompositions()).mod)
    check(program, x.numpy(), net(x).numpy(), operator)


def l2_nodes(*middle):
    return [node("ReduceL2", ["x"], ["n"], axes=[-1], keepdims=1), *middle]


EXPANDED = [node("Shape", ["x"], ["s"]), node("Expand", ["c", "s"], ["e"]), node("Div", ["x", "e"], ["y"])]
ONNX = {
    "LpNormalization": ([node("LpNormalization", ["x"], ["y"], axis=-1, p=2)], L2),
    "ReduceL2": (l2_nodes(node("Div", ["x", "n"], ["y"])), L2),
    "ReduceL2, Clip, Expand": (l2_nodes(node("Clip", ["n", "low"], ["c"]), *EXPANDED), L2),
    "ReduceSumSquare": (
        [
            node("ReduceSumSquare", ["x"], ["q"], axes=[-1], keepdims=1),
            node("Sqrt", ["q"], ["n"]),
            node("Div", ["x", "n"], ["y"]),
        ],
        L2,
    ),
    "TensorFlow": (
        [
            node("ReduceSumSquare", ["x"], ["q"], axes=[-1], keepdims=1),
            node("Max", ["q", "low"], ["m"]),
            node("Sqrt", ["m"], ["n"]),
            node("Reciprocal", ["n"], ["r"]),
            node("Mul", ["x", "r"], ["y"]),
        ],
        L2,
    ),
    "Softmax, Log": ([node("Softmax", ["x"], ["s"], axis=-1), node("Log", ["s"], ["y"])], LOG_SOFTMAX),
    "ReduceLogSumExp": (
        [node("ReduceLogSumExp", ["x"], ["l"], axes=[-1]), node("Sub", ["x", "l"], ["y"])],
        LOG_SOFTMAX,
    ),
    "log-softmax by hand": (
        [
            node("ReduceMax", ["x"], ["m"], axes=[-1]),
            node("Sub", ["x", "m"], ["d"]),
            node("Exp", ["d"], ["e"]),
            node("ReduceSum", ["e", "axis"], ["s"]),
            node("Log", ["s"], ["l"]),
            node("Sub", ["d", "l"], ["y"]),
        ],
        LOG_SOFTMAX,
    ),
}


@pytest.mark.parametrize("form", some_slow(ONNX))
def test_forms_of_onnx(form):
    nodes, operator = ONNX[form]
    constants = {"low": np.float32(1e-12), "axis": np.array([-1], np.int64)}
    made = model(nodes, {"x": SHAPE}, {"y": SHAPE}, constants, 13)
    x = RNG.standard_normal(SHAPE).astype(np.float32)
    session = onnxruntime.InferenceSession(made.SerializeToString())
    check(made, x, session.run(None, {"x": x})[0], operator)


def test_a_number_divided_by_a_norm_is_no_norm():
    nodes = [*l2_nodes(), node("Div", ["one", "n"], ["y"])]
    made = model(nodes, {"x": (2, 5)}, {"y": (2, 1)}, {"one": np.float32(1)}, 13)
    x = RNG.standard_normal((2, 5)).astype(np.float32)
    (got,) = tvm_qfp8.compile(made).run({"x": x})
    np.testing.assert_allclose(got, 1 / np.linalg.norm(x, axis=-1, keepdims=True), rtol=1e-6)


def _swiglu(a, b):
    return a * torch.sigmoid(a) * b


GATES = {
    "GLU": (lambda x: F.glu(x, -1), "table sigmoid"),
    "GeGLU, tanh": (lambda x: F.gelu(x[..., :25], approximate="tanh") * x[..., 25:], "table gelu_tanh"),
    "SwiGLU by hand": (lambda x: _swiglu(*x.chunk(2, -1)), "table silu"),
}


@pytest.mark.parametrize("form", GATES)
def test_gated_units_are_reported(form):
    function, became = GATES[form]
    x = torch.randn(SHAPE)
    module = tvm_qfp8.compile(torch.export.export(Applied(function), (x,)))
    assert any(layer.became.startswith(became) for layer in module.report.layers)
    (got,) = module.run({module.inputs[0].name: x.numpy()})
    np.testing.assert_allclose(got, function(x).numpy(), atol=4e-3)


def test_nan_stays_in_its_row():
    x = np.ones((3, 20), np.float32)
    x[1, 5] = np.nan
    made = model(
        ONNX["ReduceL2, Clip, Expand"][0], {"x": x.shape}, {"y": x.shape}, {"low": np.float32(1e-12)}, 13
    )
    (got,) = tvm_qfp8.compile(made).run({"x": x})
    assert np.isnan(got[1]).all() and np.isfinite(got[[0, 2]]).all()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.normalize(x, p=1, dim=-1),
        lambda x: x / torch.sqrt((x * x.flip(-1)).sum(-1, keepdim=True).abs()),
        lambda x: x - torch.log(torch.exp(2 * x).sum(-1, keepdim=True)),
        lambda x: (x - x.amax(-1, keepdim=True)) - torch.log(torch.exp(x).sum(-1, keepdim=True)),
    ],
    ids=["other norm", "no square", "other argument", "one shifted"],
)
def test_near_misses_stay_as_they_are(function):
    x = torch.randn(SHAPE)
    program = torch.export.export(Applied(function), (x,))
    assert not {L2, LOG_SOFTMAX} & set(operators(load_model(program).mod))


def test_calibrated_between_linear_layers():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(20, 32), Applied(lambda x: F.normalize(x, dim=-1)), torch.nn.Linear(32, 5)
    )
    x = torch.randn(8, 20)
    program = torch.export.export(net.eval(), (x,))
    module = tvm_qfp8.compile(program, calibration=[{"input": torch.randn(8, 20).numpy()} for _ in range(4)])
    kinds = [layer.became for layer in module.report.layers]
    assert [kind.split()[0] for kind in kinds] == ["QFP8", "fused", "QFP8"]
    (got,) = module.run({module.inputs[0].name: x.numpy()})
    np.testing.assert_allclose(got, net(x).detach().numpy(), atol=0.05)
