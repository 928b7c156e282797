"""Nonlinear layers with a small dip are shifted above zero: the numbers stay, the layouts lose their sign."""

import numpy as np
import pytest
from quantized_programs import program
from tvm import relax

from tvm_qfp8.calibration.evaluate import evaluate
from tvm_qfp8.calibration.linear import LINEAR
from tvm_qfp8.compiler import compile
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.fuse import op_name
from tvm_qfp8.relay_passes.lift_above_zero import lift_above_zero

RNG = np.random.default_rng(0)
ROWS, IMAGE = (1, 6, 16), (1, 5, 7, 16)


def const(*shape):
    return relax.const(RNG.standard_normal(shape).astype(np.float32))


def dense(builder, x, function=relax.op.nn.gelu, channels=16):
    y = builder.emit(function(x))
    return relax.op.add(builder.emit(relax.op.matmul(y, const(channels, 12))), const(12))


def conv(builder, x, kernel=1, padding=0, groups=1, out=8):
    y = builder.emit(relax.op.nn.silu(x))
    weight = const(out, kernel, kernel, 16 // groups)
    layouts = {"data_layout": "NHWC", "kernel_layout": "OHWI"}
    return relax.op.nn.conv2d(y, weight, padding=padding, groups=groups, **layouts)


def two_readers(builder, x):
    y = builder.emit(relax.op.nn.gelu(x))
    first, second = (builder.emit(relax.op.matmul(y, const(16, 12))) for _ in range(2))
    return relax.op.multiply(first, second)


def also_residual(builder, x):
    y = builder.emit(relax.op.nn.gelu(x))
    return relax.op.add(builder.emit(relax.op.matmul(y, const(16, 16))), y)


def also_result(builder, x):
    y = builder.emit(relax.op.nn.gelu(x))
    return relax.Tuple([builder.emit(relax.op.matmul(y, const(16, 4))), y])


def as_weight(builder, x):
    return relax.op.matmul(const(3, 6), builder.emit(relax.op.nn.gelu(x)))


LIFTED = {
    "dense": (ROWS, dense),
    "pointwise convolution": (IMAGE, conv),
    "larger convolution without padding": (IMAGE, lambda b, x: conv(b, x, 3)),
    "grouped convolution": (IMAGE, lambda b, x: conv(b, x, groups=4)),
    "depthwise convolution without padding": (IMAGE, lambda b, x: conv(b, x, 3, groups=16, out=16)),
    "two readers": (ROWS, two_readers),
    "mish": (ROWS, lambda b, x: dense(b, x, lambda v: qfp8_ops.activation("mish", v))),
    "batch of none": ((0, 16), dense),
}
LEFT = {
    "padded convolution": (IMAGE, lambda b, x: conv(b, x, 3, 1)),
    "residual": (ROWS, also_residual),
    "result": (ROWS, also_result),
    "right operand": (ROWS, as_weight),
    "no dip": (ROWS, lambda b, x: dense(b, x, relax.op.sigmoid)),
    "rows that can be rotated": ((1, 6, 64), lambda b, x: dense(b, x, channels=64)),
    "as deep as high": (ROWS, lambda b, x: dense(b, x, relax.op.tanh)),
}


def operators(mod):
    values = [b.value for block in mod["main"].body.blocks for b in block.bindings]
    return [op_name(value) for value in values if op_name(value)]


@pytest.mark.parametrize("name", LIFTED)
def test_results_stay(name):
    shape, emit = LIFTED[name]
    mod = program([(shape, None)], emit)
    lifted = lift_above_zero(mod)
    assert operators(lifted).count("relax.add") > operators(mod).count("relax.add")
    x = {"x0": (3 * RNG.standard_normal(shape)).astype(np.float32)}
    exact, found = (evaluate(one, x)[0] for one in (mod, lifted))
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LEFT)
def test_what_else_reads_or_pads_keeps_its_sign(name):
    shape, emit = LEFT[name]
    mod = program([(shape, None)], emit)
    assert operators(lift_above_zero(mod)) == operators(mod)


def test_biases_are_joined():
    lifted = lift_above_zero(program([(ROWS, None)], dense))
    assert operators(lifted).count("relax.add") == 2  # the shift and one bias


def test_a_compiled_network_errs_less():
    mod = program([((1, 64, 16), None)], dense)
    samples = [{"x0": RNG.standard_normal((1, 64, 16)).astype(np.float32)} for _ in range(8)]
    module = compile(mod, "llvm", calibration=samples)
    (layer,) = (layer for layer in module.report.layers if layer.operator == "matmul")
    assert layer.activation_layout.startswith("U")
    exact = evaluate(mod, samples[0])[0]
    error = module.run(samples[0])[0] - exact
    assert 10 * np.log10(np.square(exact - exact.mean()).sum() / np.square(error).sum()) > 35


def test_a_float32_activation_meets_the_corrected_bias(monkeypatch):
    """Rounded weights make the constant's share another one also where the activation stays float32."""
    monkeypatch.setattr("tvm_qfp8.overflow_guard.INT32_LIMIT", 1)
    mod = program([(IMAGE, None)], conv)
    samples = [{"x0": RNG.standard_normal(IMAGE).astype(np.float32)} for _ in range(8)]
    module = compile(mod, "llvm", calibration=samples)
    (layer,) = (layer for layer in module.report.layers if layer.operator == "conv2d")
    assert layer.activation_layout == "float32"
    errors = np.concatenate([module.run(x)[0] - evaluate(mod, x)[0] for x in samples])
    assert np.abs(errors.mean(axis=(0, 1, 2))).max() < 0.6 * errors.std()


def test_without_calibration_nothing_is_shifted(monkeypatch):
    """Nothing would take the constant's error off the bias."""

    def unexpected(_mod):
        raise AssertionError

    monkeypatch.setattr("tvm_qfp8.compiler.lift_above_zero", unexpected)
    compile(program([(ROWS, None)], dense), "llvm")


@pytest.mark.parametrize("name", LIFTED)
def test_layers_keep_their_names(name):
    shape, emit = LIFTED[name]
    mod = program([(shape, None)], emit)
    names = [
        [
            b.var.name
            for block in one["main"].body.blocks
            for b in block.bindings
            if op_name(b.value) in LINEAR
        ]
        for one in (mod, lift_above_zero(mod))
    ]
    assert names[0] == names[1]
