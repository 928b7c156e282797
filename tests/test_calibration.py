"""Calibration against a second, plain walk; attention, masks, fixed layouts."""

import numpy as np
import pytest
from relax_programs import NHWC, build, constant, images, random, small_network
from tvm import relax
from tvm.relax import op as R

from tvm_qfp8.calibration import calibrate, evaluate, evaluate_quantized, output_sqnr
from tvm_qfp8.calibration.activations import Observer
from tvm_qfp8.calibration.evaluate import Program
from tvm_qfp8.calibration.operators import TABLE
from tvm_qfp8.calibration.small_values import DIVISOR
from tvm_qfp8.config import Config
from tvm_qfp8.format import decode, encode, get_layout


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
    for operand in (operand for product in plan.products.values() for operand in product):
        assert operand.scale * get_layout(operand.layout).max_grid < 20
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


def test_all_zero_activation():
    observer = Observer()
    observer.record(np.zeros(10, np.float32))
    observer.record(np.zeros(10, np.float32))
    assert observer.choose().activation.scale == 1.0


def test_without_samples_weights_and_rows_that_the_network_computes_are_quantized():
    stages = []
    plan = calibrate(attention(with_mask=False), None, progress=lambda *args: stages.append(args))
    assert plan.samples == 0 and len(plan.linear) == 4 and len(plan.skipped) == 2 and not plan.products
    *of_input, last = [q.activation for q in plan.linear.values()]
    assert of_input == [None] * 3 and last.by_rows
    assert all(q.bias_correction is None for q in plan.linear.values())
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


def test_what_a_logarithm_reads_stays_in_float32():
    """A mel spectrogram: both transforms and the filters; not what is before them or behind the logarithm."""

    def body(emit, x):
        signal = emit(R.nn.relu(emit(R.matmul(x, constant(16, 32)))))
        parts = [emit(R.matmul(signal, constant(32, 12, seed=seed))) for seed in (1, 2)]
        power = emit(R.add(*(emit(R.power(part, relax.const(2.0))) for part in parts)))
        mel = emit(R.maximum(emit(R.matmul(power, constant(12, 5, seed=3))), relax.const(1e-5)))
        return emit(R.matmul(emit(R.log(mel)), constant(5, 4, seed=4)))

    mod = build({"x": ((8, 16), "float32")}, body)
    for samples in (None, [{"x": random(8, 16)}]):
        plan = calibrate(mod, samples)
        assert len(plan.linear) == 2 and len(plan.skipped) == 3
        assert all("logarithm" in reason for reason in plan.skipped.values())


def test_what_others_are_divided_by_stays_in_float32():
    """Attention that is normalised after its products: the product whose last row is the divisor, no other."""

    def body(emit, x):
        keys, queries = (emit(R.nn.relu(emit(R.matmul(x, constant(16, 8, seed=seed))))) for seed in (1, 2))
        values = emit(
            R.concat(
                [emit(R.matmul(x, constant(16, 8, seed=3))), relax.const(np.ones((1, 6, 1), np.float32))], -1
            )
        )
        state = emit(R.matmul(emit(R.permute_dims(keys, [0, 2, 1])), values))
        result = emit(R.matmul(queries, state))
        divisor = emit(R.add(emit(R.strided_slice(result, [2], [8], [9])), relax.const(1e-6)))
        return emit(R.divide(emit(R.strided_slice(result, [2], [0], [8])), divisor))

    mod = build({"x": ((1, 6, 16), "float32")}, body)
    plan = calibrate(mod, [{"x": random(1, 6, 16, seed=seed)} for seed in range(2)])
    assert list(plan.skipped.values()) == [DIVISOR]
    assert len(plan.linear) == 3 and len(plan.products) == 1


def test_a_divisor_that_bounds_leave_near_zero_stays_in_float32():
    def body(emit, x):
        y = emit(R.matmul(x, constant(16, 8)))
        return emit(R.divide(y, emit(R.clip(y, -5.0, 5.0))))

    plan = calibrate(build({"x": ((6, 16), "float32")}, body), [{"x": random(6, 16)}])
    assert list(plan.skipped.values()) == [DIVISOR]


@pytest.mark.parametrize("divisor", ["norm", "one and more", "bounded"])
def test_divisors_that_no_rounding_makes_zero(divisor):
    def body(emit, x):
        y = emit(R.matmul(x, constant(16, 8)))
        if divisor == "norm":
            return emit(R.divide(y, emit(R.sqrt(emit(R.sum(emit(R.square(y)), axis=-1, keepdims=True))))))
        if divisor == "one and more":
            return emit(R.divide(y, emit(R.add(relax.const(1.0), emit(R.abs(y))))))
        return emit(R.divide(y, emit(R.maximum(y, relax.const(0.5)))))

    assert not calibrate(build({"x": ((6, 16), "float32")}, body), [{"x": random(6, 16)}]).skipped


def test_layers_of_one_weight_keep_one_weight():
    """Row scales are found for each of them; channels are not evened out, which would change the weight."""

    def body(emit, x):
        weight = constant(32, 32, scale=0.2)
        return emit(R.matmul(emit(R.tanh(emit(R.matmul(x, weight)))), weight))

    samples = [{"x": random(1, 40, 32, seed=i) * np.exp(4 * random(1, 40, 1, seed=i + 9))} for i in range(4)]
    plan = calibrate(build({"x": ((1, 40, 32), "float32")}, body), samples)
    first, second = plan.linear.values()
    assert first.weight is second.weight
    assert first.activation.by_rows and (first.activation.factors == 1).all()


def test_outputs_of_integers_and_booleans():
    def body(emit, x):
        y = emit(relax.op.matmul(x, constant(8, 8)))
        y = emit(relax.op.matmul(emit(relax.op.nn.relu(y)), constant(8, 4, seed=1)))
        mask = emit(relax.op.greater(y, relax.const(np.float32(0))))
        return relax.Tuple([emit(relax.op.argmax(y, 1)), mask, y])

    mod = build({"x": ((6, 8), "float32")}, body)
    plan = calibrate(mod, [{"x": random(6, 8, seed=i)} for i in range(4)])
    assert len(plan.linear) == 2


def test_of_a_softmax_its_input_is_compared():
    """Probabilities near 0 and 1 say nothing."""

    def body(emit, x):
        y = emit(R.matmul(emit(R.tanh(x)), constant(16, 8, scale=20)))
        return relax.Tuple([emit(R.nn.softmax(y)), constant(3)])

    mod = build({"x": ((4, 16), "float32")}, body)
    samples = [{"x": random(4, 16, seed=i)} for i in range(3)]
    logits, fixed = output_sqnr(mod, calibrate(mod, samples), samples)
    assert 25 < logits < 50 and fixed == 200.0


def test_what_the_outputs_lose():
    """Over all samples, without rows of missing tokens; integers have no such figure."""

    def body(emit, x, attention_mask):
        y = emit(R.matmul(emit(R.tanh(emit(R.matmul(x, constant(16, 32, scale=0.2))))), constant(32, 8)))
        return relax.Tuple([y, emit(R.argmax(y, axis=1)), emit(R.multiply(x, relax.const(2.0)))])

    mod = build({"x": ((4, 16), "float32"), "attention_mask": ((1, 4), "int64")}, body)
    samples = [{"x": random(4, 16, seed=i), "attention_mask": np.array([[1, 1, 1, 0]])} for i in range(3)]
    plan = calibrate(mod, samples)
    pairs = [(evaluate(mod, s)[0][:3], evaluate_quantized(mod, plan, s)[0][:3]) for s in samples]
    signal = sum(np.square(exact).sum() for exact, _ in pairs)
    error = sum(np.square(rounded - exact).sum() for exact, rounded in pairs)
    logits, index, copy = output_sqnr(mod, plan, samples)
    assert logits == pytest.approx(10 * np.log10(signal / error), abs=1e-3)
    assert index is None and copy == 200.0
