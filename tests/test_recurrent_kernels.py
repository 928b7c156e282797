"""The kernel of recurrent layers against its NumPy twin, bit for bit where activations are codes."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from cuda_emulator import run_program
from quantized_programs import TARGETS, build, machine_runs, program, random_codes, run
from tvm import relax

from tvm_qfp8.calibration.plan import ActivationQuantization, LinearQuantization
from tvm_qfp8.calibration.recurrent import run_loop
from tvm_qfp8.calibration.recurrent_layer import quantized_product
from tvm_qfp8.quantize import QTensor
from tvm_qfp8.recurrent_cell import Cell
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.for_cuda import ForCuda
from tvm_qfp8.relay_passes.lower_groups import LowerGroups
from tvm_qfp8.relay_passes.quantize_linear import codes_constant
from tvm_qfp8.tables import build_table
from tvm_qfp8.targets import parse_target
from tvm_qfp8.topi.isa import instruction_set

SIGMOID, TANH = ("Sigmoid", 0.0, 0.0), ("Tanh", 0.0, 0.0)
CELLS = {
    "rnn": Cell("RNN", (TANH,)),
    "gru": Cell("GRU", (SIGMOID, TANH)),
    "gru, linear before reset": Cell("GRU", (SIGMOID, TANH), linear_before_reset=True),
    "lstm": Cell("LSTM", (SIGMOID, TANH, TANH)),
    "lstm, peepholes and clip": Cell("LSTM", (SIGMOID, TANH, TANH), clip=0.7, peepholes=True),
    "lstm, arithmetic": Cell(
        "LSTM",
        (("HardSigmoid", 0.3, 0.4), ("ScaledTanh", 0.9, 1.1), ("Softsign", 0.0, 0.0)),
        input_forget=True,
    ),
    "rnn, leaky": Cell("RNN", (("LeakyRelu", 0.2, 0.0),)),
    "rnn, threshold": Cell("RNN", (("ThresholdedRelu", 0.1, 0.0),)),
    "gru, elu and softplus": Cell("GRU", (("Elu", 0.5, 0.0), ("Softplus", 0.0, 0.0)), clip=1.5),
    "gru, relu and affine": Cell("GRU", (("Relu", 0.0, 0.0), ("Affine", 0.4, 0.1)), clip=0.9),
}
STATE = ActivationQuantization("E2M5", 1 / 100)


class Layer:
    """A layer with random weights; ``activation`` None for a hidden state in float32."""

    def __init__(
        self, cell, batch=1, hidden=20, steps=4, reverse=False, activation=STATE, ends=False, weight="E2M5"
    ):
        rng = np.random.default_rng(hidden)
        width = cell.gates * hidden
        self.cell, self.reverse, self.activation, self.shape = (
            cell,
            reverse,
            activation,
            (steps, batch, hidden),
        )
        codes = random_codes(rng, (width, hidden))
        codes[codes == 0x80] = 0
        scale = (rng.random(width, np.float32) + np.float32(0.5)) / np.float32(400 * hidden**0.5)
        self.weight = QTensor(codes, scale, weight, 0)
        self.bias = rng.standard_normal(width, np.float32)
        self.inputs = rng.standard_normal((steps, batch, width), np.float32)
        self.states = [rng.standard_normal((batch, hidden), np.float32) for _ in range(cell.states)]
        lengths = rng.integers(0, steps + 1, batch) if ends else np.full(batch, steps)
        self.lengths = lengths.astype(np.int32)
        self.peepholes = [rng.standard_normal(3 * hidden, np.float32)] if cell.peepholes else []

    def program(self):
        """The quantized program; inputs and first states are its parameters."""
        a, state = self.weight.scale, {}
        if self.activation is not None:
            a = a * np.float32(self.activation.scale)
            state = {"layout": self.activation.layout, "scale": self.activation.scale}

        def emit(builder, inputs, *states):
            constants = [
                codes_constant(self.weight.codes, self.weight.layout),
                *map(relax.const, (a, self.bias)),
            ]
            arguments = [
                inputs,
                *constants,
                relax.const(self.lengths),
                *states,
                *map(relax.const, self.peepholes),
            ]
            return builder.emit(qfp8_ops.recurrent(arguments, self.cell, reverse=self.reverse, **state))

        return program([(x.shape, None) for x in (self.inputs, *self.states)], emit)

    def run(self, target="native", threads=1):
        return run(build(self.program(), target, threads), self.inputs, *self.states)

    def expected(self):
        attrs = SimpleNamespace(**self.cell.attributes(), reverse=self.reverse)
        arguments = (self.inputs, None, None, self.bias, self.lengths, *self.states, *self.peepholes)
        product = quantized_product(LinearQuantization(self.weight, self.activation), self.bias)
        return run_loop(attrs, arguments, product, lambda name, x: build_table(name, max_error=1e-3)(x))


def assert_exact(layer, target="native", threads=1):
    for found, expected in zip(layer.run(target, threads), layer.expected(), strict=True):
        assert np.isfinite(expected).all() and np.abs(expected).max() > 0.01
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", CELLS)
def test_cells(name):
    assert_exact(Layer(CELLS[name], batch=3, reverse=True, ends=True))


@pytest.mark.parametrize("machine", TARGETS)
@pytest.mark.parametrize("name", ["gru", "lstm, peepholes and clip"])
def test_instruction_sets(machine, name):
    if not machine_runs(machine):
        pytest.skip(f"this CPU does not run {machine}")
    assert_exact(Layer(CELLS[name], batch=2, hidden=37), TARGETS[machine])


@pytest.mark.parametrize("batch, hidden", [(1, 1), (1, 7), (3, 5), (1, 33), (5, 65), (9, 31)])
def test_shapes(batch, hidden):
    assert_exact(Layer(CELLS["gru"], batch, hidden))
    assert_exact(Layer(CELLS["lstm"], batch, hidden))


LAYOUTS = [
    ("E1M6", "E2M5", 1),
    ("E3M4", "E2M5", 3),
    ("UE2M6", "E1M6", 1),
    ("E1M6", "E1M6", 9),
    ("UE1M7", "E1M6", 12),
]


@pytest.mark.parametrize("layout, weight, batch", LAYOUTS)
def test_layouts(layout, weight, batch):
    """Linear codes of 32 channels are multiplied as the bytes they are."""
    state = ActivationQuantization(layout, 1 / 60)
    assert_exact(Layer(CELLS["lstm"], batch, hidden=32, activation=state, weight=weight))


@pytest.mark.aarch64
@pytest.mark.parametrize("layout, weight, batch", LAYOUTS)
def test_arm(run_aarch64, layout, weight, batch):
    layer = Layer(
        CELLS["gru"], batch, hidden=21, activation=ActivationQuantization(layout, 1 / 60), weight=weight
    )
    target = "llvm -mtriple=aarch64-linux-gnu -mattr=+neon,+dotprod"
    found = run_aarch64(build(layer.program(), target), [layer.inputs, *layer.states])
    for ours, expected in zip(found, layer.expected(), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_two_threads():
    assert_exact(Layer(CELLS["lstm"], hidden=640, steps=2), threads=2)


@pytest.mark.parametrize("name", ["gru", "lstm, peepholes and clip"])
def test_state_in_float32(name):
    """Sums of float32 have another order than NumPy's."""
    layer = Layer(CELLS[name], batch=3, activation=None, ends=True)
    for found, expected in zip(layer.run(), layer.expected(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
@pytest.mark.parametrize(
    "name, options",
    [
        ("gru", {"batch": 2, "ends": True}),
        ("gru, linear before reset", {"hidden": 37}),
        ("lstm, peepholes and clip", {"batch": 2, "hidden": 270, "steps": 3, "reverse": True}),
        ("lstm", {"hidden": 37, "activation": None}),
        ("rnn", {"hidden": 5, "activation": None}),
    ],
)
def test_cuda_gives_the_bits_of_the_cpu(name, options, tmp_path):
    layer = Layer(CELLS[name], **options)
    with parse_target("cuda-sm80"):
        lowered = ForCuda()(LowerGroups(instruction_set("cuda"), 1)(layer.program()))
    found = run_program(lowered, [layer.inputs, *layer.states], tmp_path)
    for ours, theirs in zip(found, layer.run(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
