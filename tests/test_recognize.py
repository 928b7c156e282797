"""Nonlinear layers are put back together from whatever operators a file holds."""

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from tvm import relax

import tvm_qfp8
from tvm_qfp8.calibration import evaluate
from tvm_qfp8.relay_passes.recognize import Recognize
from tvm_qfp8.relay_passes.recognize_softmax import RecognizeSoftmax

op = relax.op


def const(value):
    return relax.const(np.asarray(value, np.float32))


def build(emit, shape=(2, 3, 32)):
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            output = builder.emit_output(emit(builder.emit, x))
        builder.emit_func_output(output)
    return builder.get()


def operators(mod):
    found = []
    relax.analysis.post_order_visit(
        mod["main"], lambda e: found.append(e.op.name) if isinstance(e, relax.Call) else None
    )
    return found


def gelu_torch(e, x):
    return op.multiply(
        e(op.multiply(x, e(op.add(e(op.erf(e(op.divide(x, const(1.4142135))))), const(1))))), const(0.5)
    )


def gelu_half_first(e, x):
    half = e(op.multiply(const(0.5), x))
    return op.multiply(half, e(op.add(const(1), e(op.erf(e(op.multiply(x, const(0.70710677))))))))


def gelu_by_cdf(e, x):
    cdf = e(op.multiply(const(0.5), e(op.add(const(1), e(op.erf(e(op.divide(x, const(1.4142135)))))))))
    return op.multiply(x, cdf)


def gelu_tanh(e, x):
    cube = e(op.power(x, const(3)))
    inner = e(op.multiply(const(0.7978845608), e(op.add(x, e(op.multiply(const(0.044715), cube))))))
    return op.multiply(e(op.multiply(const(0.5), x)), e(op.add(const(1), e(op.tanh(inner)))))


def silu(e, x):
    return op.multiply(e(op.sigmoid(x)), x)


def sigmoid_by_exp(e, x):
    return op.divide(const(1), e(op.add(const(1), e(op.exp(e(op.negative(x)))))))


CASES = {
    "gelu_torch": (gelu_torch, "relax.nn.gelu"),
    "gelu_half_first": (gelu_half_first, "relax.nn.gelu"),
    "gelu_by_cdf": (gelu_by_cdf, "relax.nn.gelu"),
    "gelu_tanh": (gelu_tanh, "relax.nn.gelu_tanh"),
    "silu": (silu, "relax.nn.silu"),
    "sigmoid_by_exp": (sigmoid_by_exp, "relax.sigmoid"),
}


@pytest.mark.parametrize("name", CASES)
def test_function_becomes_one_operator(name):
    emit, expected = CASES[name]
    mod = Recognize()(build(emit))
    assert operators(mod) == [expected]
    x = np.random.default_rng(0).standard_normal((2, 3, 32)).astype(np.float32)
    np.testing.assert_allclose(evaluate(mod, {"x": x})[0], evaluate(build(emit), {"x": x})[0], atol=2e-6)


def test_an_inner_value_that_is_read_elsewhere_is_kept():
    def emit(e, x):
        erf = e(op.erf(e(op.divide(x, const(1.4142135)))))
        gelu = e(op.multiply(e(op.multiply(x, e(op.add(erf, const(1))))), const(0.5)))
        return op.add(gelu, erf)

    assert sorted(operators(Recognize()(build(emit)))) == [
        "relax.add",
        "relax.divide",
        "relax.erf",
        "relax.nn.gelu",
    ]


@pytest.mark.parametrize("scale", [0.49, 0.51])
def test_a_near_miss_stays(scale):
    def emit(e, x):
        return op.multiply(
            e(op.multiply(x, e(op.add(e(op.erf(e(op.divide(x, const(1.4142135))))), const(1))))), const(scale)
        )

    assert "relax.nn.gelu" not in operators(Recognize()(build(emit)))


@pytest.mark.parametrize("shifted", [True, False])
def test_softmax(shifted):
    def emit(e, x):
        exponential = e(op.exp(e(op.subtract(x, e(op.max(x, [1], True))))) if shifted else op.exp(x))
        return op.divide(exponential, e(op.sum(exponential, [-2], True)))

    mod = RecognizeSoftmax()(build(emit))
    assert operators(mod) == ["relax.nn.softmax"]
    x = np.random.default_rng(0).standard_normal((2, 3, 32)).astype(np.float32)
    np.testing.assert_allclose(evaluate(mod, {"x": x})[0], evaluate(build(emit), {"x": x})[0], atol=1e-6)


def guarded_softmax(axis):
    """As torch.export decomposes scaled_dot_product_attention."""

    def emit(e, x):
        some = e(op.logical_not(e(op.equal(x, const(-np.inf)))))
        counted = e(op.max(e(op.astype(some, "int8")), axis=[axis], keepdims=True))
        nothing = e(op.logical_not(e(op.astype(counted, "bool"))))
        return op.where(nothing, const(np.zeros((2, 3, 32))), e(op.nn.softmax(x, axis=-1)))

    return emit


def test_softmax_that_guards_against_a_mask_that_leaves_nothing():
    assert operators(RecognizeSoftmax()(build(guarded_softmax(-1)))) == ["relax.nn.softmax"]
    assert len(operators(RecognizeSoftmax()(build(guarded_softmax(0))))) > 1


def test_softmax_that_guards_against_nan():
    def emit(e, x, other=None):
        y = e(op.nn.softmax(x, axis=-1))
        return op.where(e(op.isnan(y if other is None else other)), const(0), y)

    mod = RecognizeSoftmax()(build(emit))
    assert operators(mod) == ["relax.nn.softmax"]
    x = np.random.default_rng(0).standard_normal((2, 3, 32)).astype(np.float32)
    x[0, 1] = -np.inf
    assert (evaluate(mod, {"x": x})[0] == evaluate(build(emit), {"x": x})[0]).all()
    assert "relax.isnan" in operators(RecognizeSoftmax()(build(lambda e, x: emit(e, x, x))))


def test_a_sum_over_another_axis_is_no_softmax():
    def emit(e, x):
        exponential = e(op.exp(e(op.subtract(x, e(op.max(x, [1], True))))))
        return op.divide(exponential, e(op.sum(exponential, [1, 2], True)))

    assert "relax.nn.softmax" not in operators(RecognizeSoftmax()(build(emit)))


@pytest.mark.parametrize(
    "operator, attributes, became",
    [
        ("Mish", {}, "mish"),
        ("Elu", {"alpha": 0.5}, "elu(0.5)"),
        ("Selu", {}, "selu"),
        ("Celu", {"alpha": 1.5}, "celu(1.5)"),
        ("Softplus", {}, "softplus"),
        ("Sin", {}, "sin"),
        ("Cos", {}, "cos"),
    ],
)
def test_onnx_activations_become_tables(operator, attributes, became):
    shape = [2, 40]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    node = helper.make_node(operator, ["x"], ["y"], **attributes)
    model = helper.make_model(
        helper.make_graph([node], "g", value[:1], value[1:]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    x = (4 * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
    module = tvm_qfp8.compile(model, config=tvm_qfp8.Config(max_error=1e-3))
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x})
    (found,) = module.run({"x": x})
    assert (np.abs(found - expected) <= 1e-3 * np.maximum(1, np.abs(expected)) + 1e-6).all()
    assert f"table {became}, error <= " in module.report.to_text()


def test_a_power_with_a_constant_exponent_becomes_a_table():
    from tvm_qfp8.relay_passes.interpolate import Interpolate

    mod = Interpolate(1e-3)(build(lambda e, x: op.power(x, const(0.45))))
    assert operators(mod) == ["relax.qfp8.interpolate"]


@pytest.mark.parametrize("name", ["mish", "elu", "selu", "celu", "softplus", "silu"])
def test_torch_activations_become_tables(name):
    torch = pytest.importorskip("torch", reason="torch is an extra")
    function = getattr(torch.nn.functional, name)

    class Module(torch.nn.Module):
        def forward(self, x):
            return function(x)

    x = 4 * torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    module = tvm_qfp8.compile(torch.export.export(Module(), (x,)))
    (found,) = module.run({module.inputs[0].name: x.numpy()})
    expected = function(x).numpy()
    assert (np.abs(found - expected) <= 1e-3 * np.maximum(1, np.abs(expected)) + 1e-6).all()
    # With alpha 1 CELU is ELU.
    assert f"table {'elu' if name == 'celu' else name}" in module.report.to_text()
