"""Calibration against TVM (operators), the format module (rounding) and a second, plain walk."""

import math
import os
import tracemalloc

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op as R

from tvm_qfp8.calibration import calibrate, evaluate, evaluate_quantized
from tvm_qfp8.calibration.activations import Observer
from tvm_qfp8.calibration.evaluate import Program
from tvm_qfp8.calibration.fake_quantize import fake_quantize
from tvm_qfp8.calibration.fallback import compile_call
from tvm_qfp8.calibration.nonlinear import erf
from tvm_qfp8.calibration.operators import TABLE
from tvm_qfp8.config import Config
from tvm_qfp8.errors import CalibrationError, ModelError
from tvm_qfp8.format import LAYOUTS, decode, encode, get_layout

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


def leaves(value):
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, tuple) else [value]


CONVOLUTIONS = [
    (8, (16, 3, 3, 8), {"padding": 1, "strides": 2}),
    (8, (5, 1, 1, 8), {}),
    (8, (5, 1, 1, 8), {"strides": (2, 3)}),
    (8, (8, 3, 5, 1), {"groups": 8, "padding": (0, 1, 2, 3), "dilation": (2, 1)}),
    (8, (16, 3, 3, 1), {"groups": 8, "strides": 2}),
    (8, (12, 3, 3, 2), {"groups": 4, "padding": 1}),
    (1, (4, 3, 3, 1), {"padding": 1}),
]


def convolutions(emit, x):
    results = []
    for i, (channels, shape, options) in enumerate(CONVOLUTIONS):
        part = emit(R.strided_slice(x, [3], [0], [channels]))
        results.append(emit(R.nn.conv2d(part, constant(*shape, seed=i), **NHWC, **options)))
    nchw = emit(R.permute_dims(x, [0, 3, 1, 2]))
    results.append(emit(R.nn.conv2d(nchw, constant(6, 8, 3, 3), padding=1)))
    results.append(emit(R.nn.conv2d_transpose(nchw, constant(8, 4, 3, 3), strides=2)))
    options = {"strides": (2, 3), "padding": (1, 0, 2, 1), "output_padding": (1, 2), "groups": 2}
    results.append(emit(R.nn.conv2d_transpose(nchw, constant(8, 3, 4, 3), **options)))
    results.append(emit(R.nn.conv2d_transpose(nchw, constant(8, 3, 2, 3), dilation=(2, 2))))
    for pool in (R.nn.max_pool2d, R.nn.avg_pool2d):
        results.append(emit(pool(x, (3, 2), strides=2, padding=(1, 0, 1, 1), layout="NHWC")))
        results.append(emit(pool(nchw, (2, 2), strides=(2, 2))))
    results.append(emit(R.nn.max_pool2d(x, (3, 3), strides=2, ceil_mode=True, layout="NHWC")))
    results.append(emit(R.nn.avg_pool2d(x, 3, padding=1, count_include_pad=True, layout="NHWC")))
    results.append(emit(R.nn.adaptive_avg_pool2d(x, (3, 2), layout="NHWC")))
    return relax.Tuple(results)


def elementwise(emit, x):
    x = emit(R.reshape(x, (10, 80)))
    positive = emit(R.add(R.abs(x), relax.const(np.float32(0.1))))
    whole = emit(R.astype(R.multiply(x, relax.const(np.float32(10))), "int32"))
    unary = [R.negative, R.sign, R.floor, R.ceil, R.trunc, R.round, R.square, R.exp, R.sin, R.cos, R.tanh]
    unary += [
        R.erf,
        R.sigmoid,
        R.nn.relu,
        R.nn.gelu,
        R.nn.gelu_tanh,
        R.nn.silu,
        R.nn.softplus,
        R.nn.leakyrelu,
    ]
    results = [emit(function(x)) for function in unary]
    results += [emit(function(positive)) for function in (R.sqrt, R.rsqrt, R.log)]
    binary = [R.subtract, R.divide, R.maximum, R.minimum, R.less, R.less_equal, R.greater_equal, R.equal]
    results += [emit(function(x, positive)) for function in binary]
    results.append(emit(R.power(positive, x)))
    results.append(emit(R.divide(whole, relax.const(np.int32(3)))))
    results.append(emit(R.floor_divide(whole, relax.const(np.int32(3)))))
    mask = emit(R.greater(x, relax.const(np.float32(0))))
    results.append(emit(R.where(R.logical_not(mask), x, positive)))
    results.append(emit(R.clip(x, -0.5, 0.25)))
    results.append(emit(R.nn.prelu(x, constant(80), 1)))
    results.append(emit(R.nn.softmax(x, 0)))
    results.append(emit(R.nn.log_softmax(x, -1)))
    results.append(emit(R.nn.layer_norm(x, constant(80), constant(80, seed=1), axes=[-1])))
    results.append(emit(R.nn.rms_norm(x, constant(80), [-1], 1e-5)))
    return relax.Tuple(results)


def movements(emit, x):
    results = [emit(R.mean(x, [1, 2])), emit(R.sum(x)), emit(R.max(x, -1, keepdims=True))]
    results += [emit(R.variance(x, [3])), emit(R.argmax(x, 3)), emit(R.cumsum(x, 1))]
    x = emit(R.reshape(x, (10, 80)))
    parts = emit(R.split(x, 3, 1))
    results += [parts, emit(relax.TupleGetItem(parts, 2)), emit(R.split(x, [3, 4], 0))]
    results.append(emit(R.concat([x, x], 1)))
    results.append(emit(R.stack([x, x], 1)))
    results.append(emit(R.strided_slice(x, [0, 1], [8, -3], [1, 80], [-2, 1])))
    results.append(emit(R.strided_slice(x, [1], [79], [-81], [-1])))
    results.append(emit(R.nn.pad(x, [0, 1, 2, 3], pad_value=1.5)))
    results.append(emit(R.nn.pad(x, [1, 1, 2, 2], "reflect")))
    results.append(emit(R.take(x, relax.const(np.array([[1, 3], [0, 2]])), 0)))
    results.append(emit(R.gather_elements(x, relax.const(np.arange(80).reshape(1, 80) % 10), 0)))
    results.append(emit(R.broadcast_to(R.expand_dims(x, [0]), (2, 10, 80))))
    results.append(emit(R.squeeze(R.expand_dims(x, [0, 2]))))
    results.append(emit(R.flip(R.tile(x, (1, 2)), 1)))
    results.append(emit(R.repeat(x, 2, 0)))
    results.append(emit(R.tril(x, 1)))
    results.append(emit(R.full((2, 3), relax.const(np.float32(2)), "float32")))
    results.append(emit(R.arange(1, 9, 2, "int64")))
    results.append(emit(R.matmul(R.reshape(x, (2, 5, 80)), constant(80, 7))))
    results.append(emit(R.matmul(R.reshape(x, (2, 5, 80)), R.reshape(x, (2, 80, 5)))))
    return relax.Tuple(results)


@pytest.mark.parametrize("body", [convolutions, elementwise, movements])
def test_operators_match_tvm(body):
    mod = build({"x": ((1, 10, 10, 8), "float32")}, body)
    x = random(1, 10, 10, 8)
    assert all(step.operator in TABLE or "." not in step.operator for step in Program(mod).steps)
    found = leaves(tuple(evaluate(mod, {"x": x})))
    machine = relax.VirtualMachine(tvm.compile(mod, target="llvm"), tvm.cpu())
    expected = leaves(_numpy(machine["main"](tvm.runtime.tensor(x))))
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), i
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5, err_msg=str(i))


def _numpy(value):
    return value.numpy() if isinstance(value, tvm.runtime.Tensor) else tuple(_numpy(part) for part in value)


def test_operator_without_twin_is_compiled():
    def body(emit, x):
        both = emit(R.topk(x, 3, ret_type="both", dtype="int64"))
        return emit(relax.TupleGetItem(both, 0))

    mod = build({"x": ((4, 9), "float32")}, body)
    assert "relax.topk" not in TABLE
    x = random(4, 9)
    np.testing.assert_array_equal(evaluate(mod, {"x": x})[0], -np.sort(-x, axis=1)[:, :3])


def test_operator_that_tvm_cannot_compile_is_named():
    mod = build(
        {"x": ((2, 2), "float32")}, lambda emit, x: emit(R.call_pure_packed("no.such", x, ty_args=x.ty))
    )
    call = mod["main"].body.blocks[0].bindings[0].value
    with pytest.raises(ModelError, match="call_pure_packed"):
        compile_call(mod, call)({"x": random(2, 2)})


def test_erf_is_accurate_to_two_units_in_the_last_place_of_one():
    x = np.concatenate([np.linspace(-6, 6, 200_001), [0.0, -0.0, np.inf, -np.inf]]).astype(np.float32)
    exact = np.array([math.erf(float(v)) for v in x])
    assert np.abs(erf(x) - exact).max() < 2**-23
    assert np.isnan(erf(np.array([np.nan], np.float32)))[0]


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_fake_quantize_is_encode_then_decode(layout):
    grid = np.unique(np.abs(get_layout(layout).grid)).astype(np.float32)
    midpoints = (grid[1:] + grid[:-1]) / 2
    near = np.concatenate(
        [np.nextafter(midpoints, np.float32(0)), np.nextafter(midpoints, np.float32(np.inf))]
    )
    special = np.array([0.0, -0.0, 1e-40, np.inf, 3e38], np.float32)
    values = np.concatenate([grid, midpoints, near, special, random(100_000) * grid[-1] / 3])
    values = np.concatenate([values, -values])
    for scale in (1.0, 0.0123, 3e-5):
        x = values * np.float32(scale)
        expected = decode(encode(x, scale, layout), scale, layout)
        np.testing.assert_array_equal(fake_quantize(x, layout, scale).view(np.int32), expected.view(np.int32))


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


def as_codes(x, activation):
    """Encoded and decoded, with one scale or one for each row."""
    layout, scale = activation.layout, activation.scale
    if scale is not None:
        return decode(encode(x, scale, layout), scale, layout)
    x = x if activation.factors is None else x * activation.factors
    largest = np.abs(x).max(axis=-1, keepdims=True)
    scale = np.maximum(
        largest * (np.float32(1) / np.float32(get_layout(layout).max_grid)), np.float32(2**-126)
    )
    return decode(encode(x * (np.float32(1) / scale), 1.0, layout), 1.0, layout) * scale


def test_correction_is_sequential_and_leaves_no_mean_error():
    """Second implementation: whole batches in memory, one layer after the other."""
    mod, samples = small_network(), images(9)
    plan = calibrate(mod, iter(samples))
    assert plan.samples == 9 and list(plan.linear) == [s.name for s in _linear_steps(mod)]
    program = Program(mod)
    exact = [dict(sample) for sample in samples]
    rounded = [dict(sample) for sample in samples]
    for step in program.steps:
        for values in exact:
            values[step.name] = step.run(values)
        if step.name not in plan.linear:
            for values in rounded:
                values[step.name] = step.run(values)
            continue
        chosen = plan.linear[step.name]
        source = step.arguments[0].name
        for values in rounded:
            x = as_codes(values[source], chosen.activation)
            values[step.name] = TABLE[step.operator](step.attrs, x, chosen.weight.dequantize())
        axes = tuple(range(len(step.spec.shape) - 1))
        difference = np.stack([r[step.name] - e[step.name] for r, e in zip(rounded, exact, strict=True)])
        # Where rows have scales of their own a row counts by the inverse of its energy.
        energy = np.square(np.stack([e[step.name] for e in exact]), dtype=np.float64).sum(-1, keepdims=True)
        weights = 1 / energy if chosen.activation.by_rows else np.ones_like(energy)
        over = (0, *(axis + 1 for axis in axes))
        mean = (difference * weights).sum(over) / weights.sum(over)
        bound = 2**-20 * np.abs(difference).max()  # float32 sums of at most 144 pixels
        assert np.abs(mean - chosen.bias_correction).max() <= bound
        for values in rounded:
            values[step.name] = values[step.name] - chosen.bias_correction
        error = np.square(difference - chosen.bias_correction, dtype=np.float64).sum()
        signal = sum(np.square(e[step.name], dtype=np.float64).sum() for e in exact)
        assert chosen.sqnr_db == pytest.approx(10 * np.log10(signal / error), abs=1e-3)
    output = evaluate_quantized(mod, plan, samples[0])[0]
    np.testing.assert_array_equal(output, rounded[0][program.steps[-1].name])


def _linear_steps(mod):
    return [step for step in Program(mod).steps if step.operator in ("relax.nn.conv2d", "relax.matmul")]


def test_tensor_read_twice_is_encoded_once():
    plan = calibrate(small_network(), images(3))
    first, second = list(plan.linear.values())[-2:]
    assert first.activation == second.activation
    layouts = [chosen.activation.layout for chosen in plan.linear.values()]
    assert layouts[0][0] == "E" and layouts[1][0] == layouts[2][0] == "U"


def test_one_negative_value_in_the_last_sample_needs_a_sign():
    mod = build(
        {"x": ((1, 8, 8, 8), "float32")}, lambda emit, x: emit(R.nn.conv2d(x, constant(4, 1, 1, 8), **NHWC))
    )
    samples = [{"x": np.abs(random(1, 8, 8, 8, seed=i))} for i in range(5)]
    assert calibrate(mod, samples).linear["lv"].activation.layout[0] == "U"
    samples[-1]["x"][0, 7, 7, 7] = -1e-3
    assert calibrate(mod, samples).linear["lv"].activation.layout[0] == "E"


def test_stacked_samples_and_file_are_the_same_samples(tmp_path):
    mod, samples = small_network(), images(4)
    stacked = {"x": np.concatenate([sample["x"] for sample in samples])}
    np.savez(tmp_path / "samples.npz", labels=np.arange(4), **stacked)
    new_axis = {"x": np.stack([sample["x"] for sample in samples])}
    plans = [calibrate(mod, batches) for batches in (samples, stacked, new_axis, tmp_path / "samples.npz")]
    for plan in plans:
        assert plan.samples == 4
        for name, chosen in plan.linear.items():
            np.testing.assert_array_equal(chosen.bias_correction, plans[0].linear[name].bias_correction)


def attention(with_mask):
    """One head over 16 tokens; the mask adds -10000 to the scores of missing tokens."""

    def body(emit, x, mask):
        q, k, v = (emit(R.matmul(x, constant(8, 8, seed=i, scale=0.35))) for i in range(3))
        scores = emit(R.matmul(q, emit(R.permute_dims(k, [0, 2, 1]))))
        if with_mask:
            missing = emit(R.subtract(relax.const(np.float32(1)), emit(R.astype(mask, "float32"))))
            missing = emit(R.multiply(emit(R.expand_dims(missing, [1])), relax.const(np.float32(-10000))))
            scores = emit(R.add(scores, missing))
        context = emit(R.matmul(emit(R.nn.softmax(scores)), v))
        return emit(R.matmul(context, constant(8, 8, seed=4)))

    return build({"x": ((1, 16, 8), "float32"), "attention_mask": ((1, 16), "int64")}, body)


def sentences(count):
    lengths = np.random.default_rng(1).integers(4, 16, count)
    mask = (np.arange(16) < lengths[:, None]).astype(np.int64)
    return [{"x": random(1, 16, 8, seed=i), "attention_mask": mask[i : i + 1]} for i in range(count)]


def test_attention_products_are_quantized_and_a_mask_harms_nothing():
    samples = sentences(12)
    mod = attention(with_mask=True)
    plan = calibrate(mod, samples)
    assert len(plan.linear) == 4 and len(plan.products) == 2 and not plan.skipped
    for layout, scale in (operand for product in plan.products.values() for operand in product):
        assert scale * get_layout(layout).max_grid < 20
    exact, rounded = evaluate(mod, samples[0])[0], evaluate_quantized(mod, plan, samples[0])[0]
    assert 10 * np.log10(np.square(exact).sum() / np.square(exact - rounded).sum()) > 30


def test_rows_of_missing_tokens_do_not_count():
    mod, samples = attention(with_mask=True), sentences(6)
    plan = calibrate(mod, samples)
    for sample in samples:
        sample["x"] = np.where(sample["attention_mask"][..., None] != 0, sample["x"], np.float32(0.25))
    other = calibrate(mod, samples)
    first = next(iter(plan.linear))
    np.testing.assert_array_equal(plan.linear[first].bias_correction, other.linear[first].bias_correction)
    other = calibrate(mod, samples, token_mask="none")
    assert np.any(plan.linear[first].bias_correction != other.linear[first].bias_correction)


def test_mask_that_feeds_a_linear_layer_leaves_its_activation_in_float():
    """No layout holds -10000 beside values near 1, so neither is sacrificed."""
    mod = build({"x": ((64, 8), "float32")}, lambda emit, x: emit(R.matmul(x, constant(8, 4))))
    x = random(64, 8)
    assert calibrate(mod, [{"x": x}]).linear["lv"].activation is not None
    x[50:] -= 10000
    chosen = calibrate(mod, [{"x": x}]).linear["lv"]
    assert chosen.activation is None and "no 8-bit layout holds values up to 1e+04" in chosen.note
    assert chosen.bias_correction is not None and chosen.sqnr_db > 35


def squared_error(values, layout, scale):
    return float(np.square(fake_quantize(values, layout, scale).astype(np.float64) - values).sum())


@pytest.mark.parametrize("tail", ["normal", "heavy", "relu6", "rare"])
def test_layout_and_scale_have_the_least_error_over_all_values(tail):
    """Against every layout and a dense set of scales; the search's steps and the bins may cost 0.04 dB."""
    x = random(40_000)
    if tail == "heavy":
        x = np.random.default_rng(0).standard_t(3, 40_000).astype(np.float32)
    if tail == "relu6":
        x = np.clip(3 * x, 0, 6)
    if tail == "rare":
        x[[7, 30_000]] = 60.0
    observer = Observer()
    for part in np.split(x, 8):
        observer.record(part)
    choice = observer.choose().activation
    names = [name for name in ("E2M5", "E3M4", "UE2M6", "UE3M5") if get_layout(name).signed or x.min() >= 0]
    scales = {
        name: np.abs(x).max() / get_layout(name).max_grid * np.geomspace(2, 0.02, 400) for name in names
    }
    least = min(squared_error(x, name, scale) for name in names for scale in scales[name])
    assert squared_error(x, choice.layout, choice.scale) <= 10**0.004 * least
    if tail == "rare":  # 2 of 40,000, and yet not clipped
        assert choice.scale * get_layout(choice.layout).max_grid > 50


@pytest.mark.parametrize(
    "values", [np.float32([1e-9] * 50 + [1.0]), np.geomspace(1e-6, 1e5, 500, dtype=np.float32)]
)
def test_gates_and_wide_distributions_are_no_masks(values):
    observer = Observer()
    observer.record(values)
    assert observer.choose().activation is not None


def test_all_zero_activation():
    observer = Observer()
    observer.record(np.zeros(10, np.float32))
    observer.record(np.zeros(10, np.float32))
    assert observer.choose().activation.scale == 1.0


def test_without_samples_only_weights_are_quantized():
    stages = []
    plan = calibrate(attention(with_mask=False), None, progress=lambda *args: stages.append(args))
    assert plan.samples == 0 and len(plan.linear) == 4 and len(plan.skipped) == 2 and not plan.products
    assert all(q.activation is None and q.bias_correction is None for q in plan.linear.values())
    assert stages[-1][1:] == (4, 4)


def test_transposed_convolution_and_nchw_are_corrected_along_their_channels():
    def body(emit, x):
        y = emit(R.nn.conv2d_transpose(x, constant(6, 4, 3, 3), strides=2))
        return emit(R.nn.conv2d(y, constant(5, 4, 3, 3)))

    mod = build({"x": ((1, 6, 7, 7), "float32")}, body)
    sample = {"x": random(1, 6, 7, 7)}
    plan = calibrate(mod, [sample])
    assert [q.weight.axis for q in plan.linear.values()] == [1, 0]
    assert [len(q.bias_correction) for q in plan.linear.values()] == [4, 5]
    difference = evaluate_quantized(mod, plan, sample)[0] - evaluate(mod, sample)[0]
    assert np.abs(difference.mean(axis=(0, 2, 3))).max() < 1e-5 * np.abs(difference).max()


def test_configuration_skips_layers_and_fixes_the_layout():
    plan = calibrate(small_network(), images(2), Config(skip=("relax.matmul",), activations="E3M4"))
    assert len(plan.linear) == 3 and len(plan.skipped) == 2
    assert {q.activation.layout for q in plan.linear.values()} == {"E3M4"}


BAD = {
    "missing": (lambda s: {"y": s["x"]}, "sample 2 misses input 'x': found 'y', expected 'x'"),
    "shape": (
        lambda s: {"x": s["x"][0]},
        r"sample 2, input 'x': found shape \(12, 12, 3\), expected \(1, 12",
    ),
    "dtype": (
        lambda s: {"x": s["x"].astype(float)},
        "sample 2, input 'x': found dtype float64, expected float32",
    ),
    "nan": (lambda s: {"x": s["x"] + np.float32(np.nan)}, "sample 2, input 'x': found nan at"),
    "type": (lambda s: s["x"], "sample 2 is a ndarray"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_sample_is_named_and_nothing_is_left_behind(kind, tmp_path):
    change, message = BAD[kind]
    samples = images(3)
    samples[2] = change(samples[2])
    with pytest.raises(CalibrationError, match=message):
        calibrate(small_network(), samples, spill_folder=str(tmp_path))
    assert not os.listdir(tmp_path)


def test_no_samples_and_unreadable_files_are_errors(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 cut off")
    for batches in ([], tmp_path / "missing.npz", tmp_path / "broken.npz"):
        with pytest.raises(CalibrationError):
            calibrate(small_network(), batches)


def test_weight_that_is_not_finite_is_refused():
    bad = relax.const(np.float32([[1, np.nan], [np.inf, 0]]))
    with pytest.raises(ModelError, match="lv .relax.matmul. holds 2 values"):
        calibrate(build({"x": ((3, 2), "float32")}, lambda emit, x: emit(R.matmul(x, bad))), None)


def test_memory_does_not_grow_with_the_samples(tmp_path):
    mod = small_network()

    def peak(count):
        tracemalloc.start()
        calibrate(
            mod, ({"x": random(1, 12, 12, 3, seed=i)} for i in range(count)), spill_folder=str(tmp_path)
        )
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(4)
    few, many = peak(60), peak(120)
    sample_bytes = 60 * 12 * 12 * 8 * 4 * 2  # one 8-channel tensor of the added samples, both flows
    assert many - few < sample_bytes / 8
    assert not os.listdir(tmp_path)
