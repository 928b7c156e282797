"""ONNX RNN, GRU and LSTM against onnxruntime, every attribute; If with a constant condition."""

import numpy as np
import onnxruntime
import pytest
from models import model
from onnx import TensorProto, helper, numpy_helper

import tvm_qfp8
from tvm_qfp8.calibration import calibrate, evaluate, evaluate_quantized
from tvm_qfp8.calibration.linear import WEIGHTS
from tvm_qfp8.calibration.sensitivity import layer_effects
from tvm_qfp8.errors import UnsupportedOperatorError
from tvm_qfp8.importers import load_model
from tvm_qfp8.relay_passes.prepare import prepare

STEPS, BATCH, INPUT, HIDDEN = 5, 3, 8, 16
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def layer(
    kind,
    lengths=None,
    initial=False,
    peepholes=False,
    bias=True,
    opset=17,
    steps=STEPS,
    batch=BATCH,
    hidden=HIDDEN,
    **given,
):
    """One recurrent layer with all its outputs; ``lengths`` "input" makes them an input."""
    rng = np.random.default_rng(3)
    directions = 2 if given.get("direction") == "bidirectional" else 1
    width = GATES[kind] * hidden
    batch_first = bool(given.get("layout", 0))

    def normal(*shape):
        return (rng.standard_normal(shape) * 0.4).astype(np.float32)

    state = (batch, directions, hidden) if batch_first else (directions, batch, hidden)
    constants = {"w": normal(directions, width, INPUT), "r": normal(directions, width, hidden)}
    inputs = {"x": (batch, steps, INPUT) if batch_first else (steps, batch, INPUT)}
    names = ["x", "w", "r", "", "", "", "", ""]
    if bias:
        constants["b"], names[3] = normal(directions, 2 * width), "b"
    if lengths is not None:
        names[4] = "lengths"
        if not isinstance(lengths, str):
            constants["lengths"] = np.array(lengths, np.int32)
    if initial:
        inputs["h"], names[5] = state, "h"
        if kind == "LSTM":
            inputs["c"], names[6] = state, "c"
    if peepholes:
        constants["p"], names[7] = normal(directions, 3 * hidden), "p"
    while not names[-1]:
        names.pop()
    outputs = {"y": None, "y_h": None, **({"y_c": None} if kind == "LSTM" else {})}
    node = helper.make_node(kind, names, list(outputs), hidden_size=hidden, **given)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in inputs.items()]
    if isinstance(lengths, str):
        values.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, (batch,)))
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
    tensors = [numpy_helper.from_array(v, n) for n, v in constants.items()]
    graph = helper.make_graph([node], "test", values, results, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def feed(made, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in made.graph.input}
    found = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items() if n != "lengths"}
    if "lengths" in shapes:
        found["lengths"] = np.array([5, 2, 3], np.int32)
    return found


def onnxruntime_results(made, inputs):
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


CASES = [
    (kind, given)
    for kind in GATES
    for given in [
        {},
        {"bias": False, "opset": 11},
        {"direction": "reverse", "initial": True},
        {"direction": "bidirectional", "initial": True},
        {"direction": "bidirectional", "lengths": [5, 2, 3], "initial": True},
        {"direction": "reverse", "lengths": "input"},
        {"lengths": [5, 5, 5], "clip": 0.3},
    ]
] + [
    ("GRU", {"linear_before_reset": 1, "direction": "bidirectional"}),
    ("LSTM", {"peepholes": True, "direction": "bidirectional", "initial": True}),
    ("LSTM", {"peepholes": True, "clip": 0.4}),
    ("LSTM", {"input_forget": 1}),
    ("LSTM", {"activations": ["HardSigmoid", "ScaledTanh", "Softsign"], "activation_alpha": [0.3, 0.9],
              "activation_beta": [0.4, 0.8]}),
    ("RNN", {"activations": ["LeakyRelu"], "activation_alpha": [0.2]}),
    ("RNN", {"activations": ["Affine"], "activation_alpha": [0.7], "activation_beta": [0.1]}),
    ("RNN", {"activations": ["Relu"]}),
    ("RNN", {"activations": ["ThresholdedRelu"], "activation_alpha": [0.1]}),
    ("GRU", {"activations": ["Sigmoid", "Elu"], "activation_alpha": [0.5]}),
    ("GRU", {"activations": ["sigmoid", "Softplus"]}),
]  # fmt: skip


@pytest.mark.parametrize("kind,given", CASES, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_imported_like_onnxruntime(kind, given):
    made = layer(kind, **given)
    inputs = feed(made)
    got = evaluate(prepare(load_model(made).mod), inputs)
    for ours, theirs in zip(got, onnxruntime_results(made, inputs), strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", GATES)
def test_batch_first_is_the_transposition(kind):
    """onnxruntime refuses layout=1: the same weights with layout=0 are the witness."""
    first, plain = layer(kind, layout=1, direction="bidirectional"), layer(kind, direction="bidirectional")
    x = feed(plain)["x"]
    got = evaluate(prepare(load_model(first).mod), {"x": x.transpose(1, 0, 2)})
    expected = onnxruntime_results(plain, {"x": x})
    np.testing.assert_allclose(got[0], expected[0].transpose(2, 0, 1, 3), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(got[1:], expected[1:], strict=True):
        np.testing.assert_allclose(ours, theirs.transpose(1, 0, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", GATES)
def test_compiled_and_calibrated(kind):
    """Codes, tables and 8-bit recurrent products: the error stays that of 8-bit numbers over all steps."""
    made = layer(kind, direction="bidirectional", initial=True)
    module = tvm_qfp8.compile(made, calibration=[feed(made, seed) for seed in range(8)])
    inputs = feed(made, 50)
    for ours, theirs in zip(module.run(inputs), onnxruntime_results(made, inputs), strict=True):
        noise = np.sqrt(((ours - theirs) ** 2).mean() / (theirs**2).mean())
        assert noise < 10 ** (-25 / 20)


@pytest.mark.parametrize("batch, hidden", [(1, 7), (3, 33), (1, 70)])
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("samples", [0, 4])
def test_compiled_like_its_numpy_twin(kind, batch, hidden, samples):
    """The loop is exact (``test_recurrent_kernels``), but the twin of the matmul before it rounds its float32 sums.

    A state at the edge of two codes may so become the other one: a step of 1 / 100 times weights of about 0.1.
    """
    made = layer(kind, batch=batch, hidden=hidden, direction="bidirectional", lengths=[3] * batch)
    batches = [feed(made, seed) for seed in range(samples)] or None
    inputs = feed(made, 50)
    canonical = prepare(load_model(made).mod)
    expected = evaluate_quantized(canonical, calibrate(canonical, batches), inputs)
    for ours, twin in zip(tvm_qfp8.compile(made, calibration=batches).run(inputs), expected, strict=True):
        np.testing.assert_allclose(ours, twin, atol=2e-3 if samples else 1e-5)


def test_a_recurrent_layer_is_reported_and_can_be_left_in_float32():
    made = layer("LSTM")
    batches = [feed(made, seed) for seed in range(4)]
    report = tvm_qfp8.compile(made, calibration=batches).report
    (quantized,) = (found for found in report.layers if found.operator == "lstm")
    assert quantized.weight_layout in WEIGHTS and quantized.became == "QFP8" and quantized.sqnr_db > 30
    assert quantized.bytes_before == 4 * GATES["LSTM"] * HIDDEN**2 > 3 * quantized.bytes_after
    skipping = tvm_qfp8.Config(skip=("relax.qfp8.recurrent", "relax.matmul"))
    module = tvm_qfp8.compile(made, calibration=batches, config=skipping)
    assert {found.became for found in module.report.layers if found.operator in ("matmul", "lstm")} == {
        "float32"
    }
    inputs = feed(made, 50)
    for ours, theirs in zip(module.run(inputs), onnxruntime_results(made, inputs), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-3)


def test_a_state_may_be_multiplied_as_bytes():
    """Where the outputs can lose so much; not where they may lose nothing, for what it costs them is more."""
    made = layer("LSTM", direction="bidirectional")
    batches = [feed(made, seed) for seed in range(4)]

    def layouts(loss):
        config = tvm_qfp8.Config(byte_loss_db=loss)
        layers = tvm_qfp8.compile(made, calibration=batches, config=config).report.layers
        return {found.activation_layout for found in layers if found.operator == "lstm"}

    assert layouts(20.0) == {"E1M6"} and layouts(0.0) == {"E2M5"}


def test_the_effect_of_a_recurrent_layer_is_known():
    canonical = prepare(load_model(layer("GRU")).mod)
    batches = [feed(layer("GRU"), seed) for seed in range(4)]
    effects = layer_effects(canonical, calibrate(canonical, batches), batches)
    assert {effect.operator for effect in effects} == {"matmul", "gru"}
    assert all(20 < effect.output_sqnr_db < 80 for effect in effects)


def constant_bytes(steps):
    report = tvm_qfp8.compile(layer("LSTM", steps=steps)).report
    return report.totals["resident bytes of constants after load"], report.totals["weight bytes"]


def test_a_loop_does_not_grow_with_its_steps():
    assert constant_bytes(5) == constant_bytes(3000)


def test_run_time_sequence_lengths_compile():
    made = layer("LSTM", lengths="input", direction="bidirectional")
    inputs = feed(made)
    got = tvm_qfp8.compile(made).run(inputs)
    for ours, theirs in zip(got, onnxruntime_results(made, inputs), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.05)


def test_refusals():
    with pytest.raises(UnsupportedOperatorError, match="activation 'Sine'"):
        load_model(layer("RNN", activations=["Sine"]))
    with pytest.raises(UnsupportedOperatorError, match="alpha of elu"):
        load_model(layer("RNN", activations=["Elu"], activation_alpha=[1e9]))
    made = layer("GRU")
    weight = made.graph.initializer[0]
    made.graph.input.append(helper.make_tensor_value_info(weight.name, TensorProto.FLOAT, weight.dims))
    del made.graph.initializer[0]
    with pytest.raises(UnsupportedOperatorError, match="not constant"):
        load_model(made)


@pytest.mark.parametrize("condition", [True, False])
def test_if_with_a_constant_condition_is_folded(condition):
    def branch(name, kind):
        value = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
        nodes = [helper.make_node(kind, ["x"], ["inner"]), helper.make_node("Neg", ["inner"], ["z"])]
        return helper.make_graph(nodes, name, [], [value])

    node = helper.make_node(
        "If", ["c"], ["y"], then_branch=branch("a", "Relu"), else_branch=branch("b", "Sigmoid")
    )
    made = model([node], {"x": (2, 4)}, {"y": (2, 4)}, {"c": np.array(condition)})
    x = np.linspace(-2, 2, 8, dtype=np.float32).reshape(2, 4)
    (got,) = evaluate(prepare(load_model(made).mod), {"x": x})
    np.testing.assert_allclose(got, onnxruntime_results(made, {"x": x})[0], rtol=1e-6, atol=1e-6)


KNOWN = [
    ("LSTM", {}, True),
    ("LSTM", {"peepholes": True, "clip": 0.4}, True),
    ("LSTM", {"activations": ["HardSigmoid", "ScaledTanh", "Softsign"], "activation_alpha": [0.3, 0.9],
              "activation_beta": [0.4, 0.8]}, False),
    ("GRU", {}, True),
    ("GRU", {"linear_before_reset": 1}, True),
    ("GRU", {"activations": ["Sigmoid", "Elu"], "activation_alpha": [0.5]}, False),
    ("RNN", {}, True),
    ("RNN", {"activations": ["Relu"]}, False),
    ("LSTM", {"initial": True}, False),
]  # fmt: skip


@pytest.mark.parametrize("kind, given, known", KNOWN)
def test_gates_bound_the_state(kind, given, known):
    """Then its scale is known without samples; a state that the module is given may be anything."""
    canonical = prepare(load_model(layer(kind, **given)).mod)
    shape = GATES[kind] * HIDDEN, HIDDEN
    (chosen,) = (v for v in calibrate(canonical, None).linear.values() if v.weight.codes.shape == shape)
    assert (chosen.activation is not None) == known
    if known:
        assert chosen.activation.layout == "E1M6" and chosen.activation.scale == np.float32(1 / 127)
    weights_only = calibrate(canonical, None, tvm_qfp8.Config(activations="float32")).linear.values()
    assert all(one.activation is None for one in weights_only)
