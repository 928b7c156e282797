"""Linear layers with float32 activations against their NumPy twins, bit for bit, on every instruction set."""

import numpy as np
import pytest
from quantized_programs import TARGETS, build, machine_runs, program, random_codes, run
from tvm import relax

from tvm_qfp8.format import decode_grid, get_layout
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.quantize_linear import codes_constant
from tvm_qfp8.topi import reference
from tvm_qfp8.topi.batch_matmul import BatchMatmulShape
from tvm_qfp8.topi.conv2d import ConvShape

ONES, NONE = (1, 1), (0, 0, 0, 0)


def weights(rng, shape, layout):
    """(constant, values) of random weights; float32 ones without layout."""
    if layout is None:
        values = rng.standard_normal(shape, np.float32)
        return relax.const(values), values
    codes = random_codes(rng, shape)
    return codes_constant(codes, layout), decode_grid(codes, get_layout(layout)).astype(np.float32)


class Dense:
    def __init__(self, rows, columns, depth, layout="E2M5"):
        rng = np.random.default_rng(depth)
        self.inputs = [rng.standard_normal((rows, depth), np.float32)]
        self.constant, self.weight = weights(rng, (columns, depth), layout)
        self.a, self.bias = rng.random(columns, np.float32), rng.standard_normal(columns, np.float32)

    def program(self):
        def emit(_builder, x):
            return qfp8_ops.matmul(x, self.constant, relax.const(self.a), relax.const(self.bias))

        return program([(self.inputs[0].shape, None)], emit)

    def expected(self):
        return reference.scale_and_bias(
            reference.float_matmul(self.inputs[0], self.weight), self.a, self.bias
        )


class Conv:
    def __init__(self, size, channels, out_channels, kernel, layout="E2M5", **options):
        rng = np.random.default_rng(channels)
        batch, height, width = size
        options = {"stride": ONES, "padding": NONE, "dilation": ONES, "groups": 1} | options
        weight = None if layout is None else get_layout(layout)
        self.shape = ConvShape(
            batch, height, width, channels, out_channels, kernel, activation=None, weight=weight, **options
        )
        self.inputs = [rng.standard_normal((batch, height, width, channels), np.float32)]
        shape = (out_channels, *kernel, channels // options["groups"])
        self.constant, self.weight = weights(rng, shape, layout)
        self.a, self.bias = (
            rng.random(out_channels, np.float32),
            rng.standard_normal(out_channels, np.float32),
        )

    def program(self):
        def emit(_builder, x):
            return qfp8_ops.conv2d(
                x,
                self.constant,
                relax.const(self.a),
                relax.const(self.bias),
                strides=self.shape.stride,
                padding=self.shape.padding,
                dilation=self.shape.dilation,
                groups=self.shape.groups,
                input_dilation=self.shape.input_dilation,
            )

        return program([(self.inputs[0].shape, None)], emit)

    def expected(self):
        sums = reference.float_conv2d(self.inputs[0], self.weight, self.shape)
        return reference.scale_and_bias(sums, self.a, self.bias)


class Product:
    def __init__(self, batch, rows, columns, depth, transpose):
        rng = np.random.default_rng(depth)
        self.shape = BatchMatmulShape(batch, rows, columns, depth, None, None, transpose)
        y = (batch, columns, depth) if transpose else (batch, depth, columns)
        self.inputs = [rng.standard_normal(one, np.float32) for one in ((batch, rows, depth), y)]

    def program(self):
        def emit(_builder, x, y):
            return qfp8_ops.batch_matmul(x, y, 0.125, transpose_y=self.shape.transpose_y)

        return program([(one.shape, None) for one in self.inputs], emit)

    def expected(self):
        x, y = self.inputs
        columns = y if self.shape.transpose_y else y.swapaxes(-1, -2)
        sums = [reference.float_matmul(*pair) for pair in zip(x, columns, strict=True)]
        return np.stack(sums) * np.float32(0.125)


LAYERS = {
    "one row": Dense(1, 70, 33),
    "one row, one column": Dense(1, 1, 5),
    "three rows, float32 weights": Dense(3, 40, 19, None),
    "many rows": Dense(45, 77, 50),
    "many rows, E3M4": Dense(23, 100, 31, "E3M4"),
    "many rows, E1M6": Dense(7, 16, 8, "E1M6"),
    "deep": Dense(9, 33, 1100),
    "image": Conv((1, 11, 9), 3, 20, (3, 3), stride=(2, 2), padding=(1, 1, 1, 1)),
    "3x3": Conv((2, 7, 6), 19, 37, (3, 3), padding=(1, 0, 2, 1)),
    "3x3, float32 weights": Conv((1, 6, 6), 17, 8, (3, 3), None, dilation=(2, 2)),
    "pointwise": Conv((1, 5, 7), 21, 50, (1, 1)),
    "groups": Conv((1, 6, 5), 36, 60, (3, 2), groups=3, padding=(1, 1, 1, 0)),
    "transposed": Conv((1, 4, 5), 6, 9, (3, 3), padding=(1, 2, 2, 1), input_dilation=(2, 2)),
    "transposed, windows apart": Conv((1, 4, 5), 7, 16, (2, 2), padding=(1, 1, 1, 1), input_dilation=(2, 2)),
    "depthwise": Conv((1, 9, 10), 37, 37, (3, 3), groups=37, padding=(1, 1, 1, 1)),
    "depthwise, stride 2": Conv((2, 8, 7), 16, 16, (5, 5), groups=16, stride=(2, 2), padding=(2, 2, 2, 2)),
    "depthwise, float32 weights": Conv((1, 6, 6), 20, 20, (3, 3), None, groups=20, dilation=(1, 2)),
    "depthwise, few channels": Conv((1, 6, 6), 3, 3, (3, 3), groups=3, padding=(1, 1, 1, 1)),
    "attention": Product(3, 13, 18, 32, True),
    "attention, values": Product(2, 9, 37, 13, False),
    "product of single values": Product(1, 1, 1, 1, True),
}


@pytest.mark.parametrize("machine", TARGETS)
@pytest.mark.parametrize("name", LAYERS)
def test_bits(name, machine):
    if not machine_runs(machine):
        pytest.skip(f"this CPU does not run {machine}")
    layer = LAYERS[name]
    (found,) = run(build(layer.program(), TARGETS[machine]), *layer.inputs)
    np.testing.assert_array_equal(found, layer.expected())


@pytest.mark.parametrize("name", ["many rows", "one row", "3x3", "depthwise", "attention"])
def test_two_threads(name):
    layer = LAYERS[name]
    (found,) = run(build(layer.program(), "native", threads=2), *layer.inputs)
    np.testing.assert_array_equal(found, layer.expected())


@pytest.mark.aarch64
@pytest.mark.parametrize("name", LAYERS)
def test_arm(run_aarch64, name):
    layer = LAYERS[name]
    target = "llvm -mtriple=aarch64-linux-gnu -mattr=+neon,+i8mm,+dotprod"
    (found,) = run_aarch64(build(layer.program(), target), layer.inputs)
    np.testing.assert_array_equal(found, layer.expected())
