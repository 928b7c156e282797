"""Relax programs that tests of calibration build."""

from __future__ import annotations

import numpy as np
from tvm import relax
from tvm.relax import op as R

NHWC = {"data_layout": "NHWC", "kernel_layout": "OHWI"}


def build(shapes, body):
    """Module of one dataflow block: ``body(emit, *inputs)`` gives the output expression."""
    inputs = [relax.Var(name, relax.TensorType(shape, dtype)) for name, (shape, dtype) in shapes.items()]
    builder = relax.BlockBuilder()
    with builder.function("main", inputs):
        with builder.dataflow():
            output = builder.emit_output(body(builder.emit, *inputs))
        builder.emit_func_output(output)
    return builder.finalize()


def constant(*shape, seed=0, scale=1.0):
    return relax.const((np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32))


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def small_network():
    """Convolution, depthwise and pointwise convolution with a shortcut, two heads that share their input."""

    def body(emit, x):
        y = emit(R.nn.conv2d(x, constant(8, 3, 3, 3, scale=0.3), padding=1, **NHWC))
        shortcut = emit(R.clip(emit(R.add(y, constant(8, seed=1))), 0, 6))
        y = emit(R.nn.conv2d(shortcut, constant(8, 3, 3, 1, seed=2, scale=0.4), groups=8, padding=1, **NHWC))
        y = emit(R.nn.relu(emit(R.add(y, constant(8, seed=3)))))
        y = emit(R.nn.conv2d(y, constant(8, 1, 1, 8, seed=4, scale=0.5), **NHWC))
        y = emit(R.mean(emit(R.add(y, shortcut)), [1, 2]))
        first = emit(R.matmul(y, constant(8, 6, seed=5)))
        return emit(R.add(first, emit(R.matmul(y, constant(8, 6, seed=6)))))

    return build({"x": ((1, 12, 12, 3), "float32")}, body)


def images(count):
    return [{"x": random(1, 12, 12, 3, seed=i)} for i in range(count)]
