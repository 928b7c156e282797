"""Sums of a residual network are read as codes by later sums, too, where that costs the outputs little."""

import numpy as np
import pytest
from quantized_programs import RUNS, TARGETS, build, program, random_codes, run
from relax_programs import build as network_of
from relax_programs import constant, random
from tvm import relax
from tvm.relax import op as R

import tvm_qfp8
from tvm_qfp8.calibration import calibrate, evaluate, evaluate_quantized
from tvm_qfp8.config import Config
from tvm_qfp8.format import decode
from tvm_qfp8.relay_passes import qfp8_ops

RNG = np.random.default_rng(8)
SHAPE = (1, 3, 5, 37)
SCALE = np.float32(0.03)
FACTORS = RNG.standard_normal(SHAPE[-1], np.float32)


@pytest.mark.parametrize("layout", ["E2M5", "UE2M6", "E3M4", "E1M6", "UE1M7"])
@pytest.mark.parametrize("name", RUNS)
def test_elementwise_operators_read_codes(name, layout):
    """Beside a tensor of the same shape, alone, and twice, in rows that end within a vector."""

    def emit(builder, x, codes):
        values = builder.emit(qfp8_ops.decode(codes, SCALE))
        total = builder.emit(R.add(builder.emit(R.add(x, values)), values))
        scaled = builder.emit(R.multiply(total, relax.const(FACTORS)))
        return builder.emit(relax.Tuple([scaled, builder.emit(R.nn.relu(values))]))

    mod = program([(SHAPE, None), (SHAPE, layout)], emit)
    x, codes = RNG.standard_normal(SHAPE, np.float32), random_codes(RNG, SHAPE)
    codes[codes == 0x80] = 0
    values = decode(codes, SCALE, layout).astype(np.float32)
    total, positive = run(build(mod, TARGETS[name]), x, codes)
    np.testing.assert_array_equal(total, (x + values + values) * FACTORS)
    np.testing.assert_array_equal(positive, np.maximum(values, 0))


def residual_network(side=40, channels=96, mean=False):
    """Two residual blocks and a layer; the sum between them is read by a mean, too, if asked for."""

    def convolution(emit, x, seed):
        weight = constant(channels, 1, 1, channels, seed=seed, scale=0.1)
        return emit(R.nn.conv2d(x, weight, data_layout="NHWC", kernel_layout="OHWI"))

    def body(emit, x):
        total = emit(R.nn.relu(convolution(emit, x, 1)))
        for seed in (2, 4):
            between = total
            inner = emit(R.nn.relu(convolution(emit, total, seed)))
            total = emit(R.nn.relu(emit(R.add(convolution(emit, inner, seed + 1), total))))
        means = [emit(R.mean(one, [1, 2], keepdims=True)) for one in ((total, between) if mean else (total,))]
        return convolution(emit, means[0] if not mean else emit(R.add(*means)), 6)

    return network_of({"x": ((1, side, side, channels), "float32")}, body)


def samples(side=40, channels=96):
    return [{"x": random(1, side, side, channels, seed=i)} for i in range(3)]


def test_sums_of_large_images_are_kept_as_codes():
    mod, data = residual_network(), samples()
    plan, finer = (calibrate(mod, data, Config(byte_loss_db=loss)) for loss in (None, 0.0))
    assert len(plan.codes) == 2 and not finer.codes
    readers = [chosen.activation for chosen in plan.linear.values()]
    assert all(readers.count(kept) == 1 for kept in plan.codes.values())
    exact, found = evaluate(mod, data[0])[0], evaluate_quantized(mod, plan, data[0])[0]
    compiled = tvm_qfp8.compile(mod, "native", calibration=data)
    assert compiled.report.totals["sums kept as codes"] == ", ".join(plan.codes)
    np.testing.assert_allclose(compiled.run(data[0])[0], found, atol=1e-5 * np.abs(found).max())
    assert np.square(exact).sum() > 10**2.5 * np.square(found - exact).sum()


def test_small_images_stay_finer():
    """They cost nothing."""
    assert not calibrate(residual_network(side=20), samples(side=20)).codes


def test_what_others_read_stays_finer():
    """A mean reads values: of two sums one is left."""
    plain, read = (set(calibrate(residual_network(mean=mean), samples()).codes) for mean in (False, True))
    assert len(plain) == 2 and len(read) == 1 and read < plain
