"""A scale for each row or channel: the kernels are their NumPy twins, and calibration takes it where it gains."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from cuda_emulator import run_program
from quantized_programs import RUNS, TARGETS, WITHOUT_TILES, build, program, run
from tvm import relax

from tvm_qfp8.calibration import calibrate
from tvm_qfp8.calibration.fake_quantize import fake_quantize_rows, row_scales
from tvm_qfp8.calibration.plan import ActivationQuantization
from tvm_qfp8.calibration.quantized import evaluate_quantized
from tvm_qfp8.compiler import compile
from tvm_qfp8.config import Config
from tvm_qfp8.format import decode, get_layout
from tvm_qfp8.quantize import quantize
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.lower_groups import LowerGroups
from tvm_qfp8.relay_passes.quantize_linear import QuantizeLinear, codes_constant
from tvm_qfp8.topi import reference
from tvm_qfp8.topi.isa import instruction_set

RNG = np.random.default_rng(0)
LAYOUT_PAIRS = [("E2M5", "E2M5"), ("E3M4", "E2M5"), ("E1M6", "E1M6"), ("UE2M6", "E2M5"), ("UE1M7", "E1M6")]


def rows(shape):
    """Rows of very different sizes: ordinary, zero, tiny, huge."""
    x = RNG.standard_normal(shape).astype(np.float32)
    flat = x.reshape(-1, shape[-1])
    for index, size in enumerate((1.0, 0.0, 1e-42, 1e37, 300.0)[: len(flat)]):
        flat[index] *= np.float32(size)
    return x


def encoded(shape, layout, factors):
    def emit(builder, x):
        both = builder.emit(qfp8_ops.encode_rows(x, relax.const(factors), get_layout(layout)))
        codes, scales = (builder.emit(relax.TupleGetItem(both, part)) for part in range(2))
        return relax.Tuple([codes, scales])

    return program([(shape, None)], emit)


@pytest.mark.parametrize("isa", RUNS)
@pytest.mark.parametrize("layout", ["E2M5", "E3M4", "E1M6", "UE2M6", "UE1M7"])
@pytest.mark.parametrize("shape", [(5, 384), (7, 1), (2, 3, 50), (1, 16), (0, 8)])
def test_encode_is_its_twin(isa, layout, shape):
    factors = np.exp2(RNG.uniform(-3, 3, shape[-1])).astype(np.float32)
    x = rows(shape)
    x = x if get_layout(layout).signed else np.abs(x)
    codes, scales = run(build(encoded(shape, layout, factors), TARGETS[isa]), x)
    with np.errstate(all="ignore"):
        expected = reference.encode_rows(x, get_layout(layout), factors)
    np.testing.assert_array_equal(codes, expected[0])
    np.testing.assert_array_equal(scales, expected[1])


def encoded_samples(shape, layout):
    def emit(builder, x):
        both = builder.emit(qfp8_ops.encode_samples(x, get_layout(layout)))
        codes, scales = (builder.emit(relax.TupleGetItem(both, part)) for part in range(2))
        return relax.Tuple([codes, scales])

    return program([(shape, None)], emit)


@pytest.mark.parametrize("isa", RUNS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(5, 6, 7, 3), (1, 1), (2, 70_001), (2, 65_536), (0, 8, 2)])
def test_encode_by_sample_is_its_twin(isa, threads, shape):
    """Threads share large samples, in overlapping parts."""
    x = rows((shape[0], int(np.prod(shape[1:])))).reshape(shape)
    x[:1] *= np.linspace(0, 1, shape[1]).reshape(-1, *[1] * (len(shape) - 2))  # the largest come last
    codes, scales = run(build(encoded_samples(shape, "E3M4"), TARGETS[isa], threads), x)
    with np.errstate(all="ignore"):
        expected = reference.encode_samples(x, get_layout("E3M4"))
    np.testing.assert_array_equal(codes, expected[0])
    np.testing.assert_array_equal(scales, expected[1])


@pytest.mark.parametrize("isa", RUNS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size, channels", [((6, 7), (16, 5, 33)), ((70, 61), (16, 3))])
def test_an_encode_by_sample_reads_the_parts_of_what_it_joins(isa, threads, size, channels):
    parts = [rows((2, *size, count)) * np.float32(1 + index) for index, count in enumerate(channels)]

    def emit(builder, *parts):
        joined = builder.emit(relax.op.concat([builder.emit(relax.op.nn.relu(part)) for part in parts], -1))
        both = builder.emit(qfp8_ops.encode_samples(joined, get_layout("UE2M6")))
        return relax.Tuple([builder.emit(relax.TupleGetItem(both, part)) for part in range(2)])

    mod = program([(part.shape, None) for part in parts], emit)
    codes, scales = run(build(mod, TARGETS[isa], threads), *parts)
    with np.errstate(all="ignore"):
        joined = np.maximum(np.concatenate(parts, -1), np.float32(0))
        expected = reference.encode_samples(joined, get_layout("UE2M6"))
    np.testing.assert_array_equal(codes, expected[0])
    np.testing.assert_array_equal(scales, expected[1])
    kernels = {var.name_hint for var in LowerGroups(instruction_set(isa, []), threads)(mod).get_global_vars()}
    assert "encode_samples" in kernels and "concat" not in kernels


def test_cuda_encodes_samples_alike(tmp_path):
    from tvm_qfp8.relay_passes.for_cuda import ForCuda
    from tvm_qfp8.targets import parse_target

    x = rows((3, 70)).reshape(3, 5, 14)
    with parse_target("cuda-sm80"):
        lowered = LowerGroups(instruction_set("cuda", frozenset()), 1)(encoded_samples(x.shape, "E3M4"))
        codes, scales = run_program(ForCuda()(lowered), [x], tmp_path)
    expected = reference.encode_samples(x, get_layout("E3M4"))
    np.testing.assert_array_equal(codes, expected[0])
    np.testing.assert_array_equal(scales, expected[1])


def test_infinity_and_nan_leave_numbers():
    x = rows((3, 20))
    x[0, 3], x[1, 4], x[2, 5] = np.inf, -np.inf, np.nan
    codes, scales = run(build(encoded((3, 20), "E2M5", np.ones(20, np.float32)), WITHOUT_TILES), x)
    assert np.isfinite(scales).all() and np.isfinite(decode(codes, 1.0, "E2M5")).all()
    assert (codes[0, 3], codes[1, 4], codes[2, 5]) == (0x7F, 0xFF, 0x00)


@pytest.mark.parametrize("layout", ["E2M5", "E3M4", "E1M6", "UE3M5", "UE1M7"])
def test_rounding_in_calibration_is_what_kernels_do(layout):
    x = rows((5, 37))
    x = x if get_layout(layout).signed else np.abs(x)
    codes, scales = reference.encode_rows(x, get_layout(layout))
    np.testing.assert_array_equal(row_scales(x, layout)[:, 0], scales)
    np.testing.assert_array_equal(fake_quantize_rows(x, layout), decode(codes, 1.0, layout) * scales[:, None])


def dense(shape, columns, layout, weight_layout, factors):
    weight = quantize(RNG.standard_normal((columns, shape[-1])).astype(np.float32), 0, weight_layout)
    a, bias = RNG.standard_normal((2, columns)).astype(np.float32)

    def emit(builder, x):
        both = builder.emit(qfp8_ops.encode_rows(x, relax.const(factors), get_layout(layout)))
        codes, scales = (builder.emit(relax.TupleGetItem(both, part)) for part in range(2))
        constants = codes_constant(weight.codes, weight_layout), relax.const(a), relax.const(bias)
        return qfp8_ops.matmul(codes, *constants, row_scales=scales)

    def twin(x):
        codes, scales = reference.encode_rows(x, get_layout(layout), factors)
        total = reference.matmul(codes, weight.codes, get_layout(layout), get_layout(weight_layout))
        return reference.scale_and_bias(total, a, bias, scales)

    return program([(shape, None)], emit), twin


@pytest.mark.parametrize("isa", RUNS)
@pytest.mark.parametrize("layouts", LAYOUT_PAIRS)
@pytest.mark.parametrize("shape, columns", [((1, 70), 33), ((2, 9, 64), 48), ((40, 30), 17)])
def test_matmul_is_its_twin(isa, layouts, shape, columns):
    factors = np.exp2(RNG.uniform(-3, 3, shape[-1])).astype(np.float32)
    mod, twin = dense(shape, columns, *layouts, factors)
    x = RNG.standard_normal(shape).astype(np.float32)
    np.testing.assert_array_equal(run(build(mod, TARGETS[isa]), x)[0], twin(x))


def outliers(count, tokens=24, channels=32):
    """Tokens and channels a hundred times as large as the rest."""
    samples = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((1, tokens, channels)).astype(np.float32)
        x[:, 0] *= 300
        x[..., 5] *= 40
        samples.append({"x": x})
    return samples


def network(channels=32):
    rng = np.random.default_rng(3)
    weights = [relax.const(rng.standard_normal((channels, 40)).astype(np.float32)) for _ in range(2)]
    return program([((1, 24, channels), None)], lambda builder, x: _two(builder, x, weights))


def _two(builder, x, weights):
    first, second = (builder.emit(relax.op.matmul(x, weight)) for weight in weights)
    return relax.op.add(first, second)


def db(exact, found):
    """Mean over the tokens: the large ones would hide the rest."""
    signal, error = np.square(exact).sum(-1), np.square(exact - found).sum(-1)
    return float(np.mean(10 * np.log10(signal / error)))


def test_calibration_takes_row_scales_where_tokens_differ():
    mod, samples = network(), [{"x0": sample["x"]} for sample in outliers(6)]
    plan = calibrate(mod, samples)
    chosen = list(plan.linear.values())
    assert all(one.activation.by_rows and one.activation.factors is not None for one in chosen)
    assert chosen[0].activation is chosen[1].activation  # encoded once
    exact = samples[0]["x0"] @ sum(w.value.numpy() for w in weights_of(mod))
    assert db(exact, evaluate_quantized(mod, plan, samples[0])[0]) > 30
    fixed = calibrate(mod, samples, Config(activations="E3M4"))
    assert not any(one.activation.by_rows for one in fixed.linear.values())
    assert db(exact, evaluate_quantized(mod, fixed, samples[0])[0]) < 20


def weights_of(mod):
    found = []
    relax.analysis.post_order_visit(
        mod["main"], lambda e: found.append(e) if isinstance(e, tvm.ir.GenericConst) else None
    )
    return found


def test_calibration_keeps_one_scale_where_tokens_are_alike():
    values = np.linspace(-1, 1, 32, dtype=np.float32)
    samples = [{"x0": np.stack([RNG.permutation(values) for _ in range(24)])[None]} for _ in range(4)]
    plan = calibrate(network(), samples)
    assert not any(one.activation.by_rows for one in plan.linear.values())


def test_a_compiled_module_says_so_and_computes_what_calibration_saw():
    mod, samples = network(), [{"x0": sample["x"]} for sample in outliers(6)]
    module = compile(mod, calibration=samples)
    layers = [layer for layer in module.report.layers if layer.operator == "matmul"]
    assert all(layer.activation_layout.removesuffix(", rotated").endswith(" by row") for layer in layers)
    assert "by row" in module.report.to_text()
    exact = samples[0]["x0"] @ sum(w.value.numpy() for w in weights_of(mod))
    assert db(exact, module.run(samples[0])[0]) > 30


def test_cuda_gives_the_same_bits(tmp_path):
    factors = np.exp2(RNG.uniform(-3, 3, 48)).astype(np.float32)
    mod, twin = dense((20, 48), 24, "E2M5", "E2M5", factors)
    x = RNG.standard_normal((20, 48)).astype(np.float32)
    lowered = lowered_for_cuda(mod)
    np.testing.assert_array_equal(run_program(lowered, [x], tmp_path)[0], twin(x))


def lowered_for_cuda(mod):
    from tvm_qfp8.relay_passes.for_cuda import ForCuda
    from tvm_qfp8.targets import parse_target

    with parse_target("cuda-sm80"):
        return ForCuda()(LowerGroups(instruction_set("cuda", frozenset()), 1)(mod))


def test_factors_belong_to_the_weights():
    factors = np.array([4.0, 0.5, 1.0], np.float32)
    activation = ActivationQuantization("E2M5", None, factors)
    weight = RNG.standard_normal((3, 5)).astype(np.float32)
    x = RNG.standard_normal((7, 3)).astype(np.float32)
    product = (x * factors) @ activation.met_by(weight, 0)
    np.testing.assert_allclose(product, x @ weight, rtol=1e-5, atol=1e-6)


def depthwise(channels=24):
    rng = np.random.default_rng(4)
    weight = relax.const(rng.standard_normal((channels, 3, 3, 1)).astype(np.float32))
    options = dict(padding=1, groups=channels, data_layout="NHWC", kernel_layout="OHWI")

    def emit(builder, x):
        return relax.op.nn.conv2d(builder.emit(relax.op.clip(x, 0.0, 6.0)), weight, **options)

    return program([((1, 10, 12, channels), None)], emit)


def uneven(count, channels=24):
    sizes = np.exp2(np.linspace(-8, 2, channels)).astype(np.float32)
    return [
        {"x0": np.random.default_rng(seed).standard_normal((1, 10, 12, channels)).astype(np.float32) * sizes}
        for seed in range(count)
    ]


@pytest.mark.parametrize("target", [WITHOUT_TILES, "cuda-sm80"])
def test_depthwise_layers_read_a_scale_for_each_channel(target, tmp_path):
    mod, samples = depthwise(), uneven(4)
    plan = calibrate(mod, samples)
    (chosen,) = plan.linear.values()
    factors = chosen.activation.factors
    assert chosen.activation.described.endswith(" by channel")
    np.testing.assert_array_equal(np.log2(factors), np.round(np.log2(factors)))
    x = samples[0]["x0"]
    expected = evaluate_quantized(mod, plan, samples[0])[0]
    if target.startswith("cuda"):
        lowered = lowered_for_cuda(QuantizeLinear(plan)(mod))
        found = run_program(lowered, [x], tmp_path)[0]
    else:
        found = compile(mod, target, calibration=samples).run(samples[0])[0]
    # Exact sums here, float32 sums of nine products there.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_channels_that_are_alike_share_a_scale():
    samples = [
        {"x0": np.random.default_rng(i).standard_normal((1, 10, 12, 24)).astype(np.float32)} for i in range(4)
    ]
    (chosen,) = calibrate(depthwise(), samples).linear.values()
    assert chosen.activation.factors is None


@pytest.mark.aarch64
@pytest.mark.parametrize("target", ["rpi4", "rpi5", "graviton3"])
def test_aarch64_gives_the_same_bits(run_aarch64, target):
    factors = np.exp2(RNG.uniform(-3, 3, 50)).astype(np.float32)
    x = rows((7, 50))[:2]
    for layouts in (("E1M6", "E1M6"), ("E3M4", "E2M5"), ("UE1M7", "E1M6")):
        mod, twin = dense(x.shape, 24, *layouts, factors)
        assert np.array_equal(run_aarch64(build(mod, target), [x])[0], twin(x))


def test_a_kernel_whose_sums_could_overflow_has_no_factors():
    """One could not go back to float32 activations: the weights are divided by them."""
    taps, channels = 4096, 2
    weight = np.full((channels, 1, taps, 1), 0.5, np.float32) * np.float32([1, 1e3]).reshape(-1, 1, 1, 1)
    options = dict(groups=channels, data_layout="NHWC", kernel_layout="OHWI")
    mod = program(
        [((1, 1, taps + 3, channels), None)],
        lambda builder, x: relax.op.nn.conv2d(x, relax.const(weight), **options),
    )
    x = np.abs(RNG.standard_normal((1, 1, taps + 3, channels))).astype(np.float32) * np.float32([1, 1e-3])
    (chosen,) = calibrate(mod, [{"x0": x}]).linear.values()
    assert chosen.activation.factors is None
    module = compile(mod, calibration=[{"x0": x}])
    windows = np.lib.stride_tricks.sliding_window_view(x[0, 0], taps, axis=0).sum(-1) * weight[:, 0, 0, 0]
    np.testing.assert_allclose(module.run({"x0": x})[0][0, 0], windows, rtol=0.05)
