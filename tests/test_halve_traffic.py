"""What goes from kernel to kernel in float32 is rounded to float16 or, where its range is not proved, to bfloat16."""

import ml_dtypes
import numpy as np
import pytest
from quantized_programs import TARGETS, TILES, build, machine_runs, program, random_codes, run
from tvm import relax

from tvm_qfp8.format import decode_grid, encode, get_layout
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.fuse import op_name
from tvm_qfp8.relay_passes.halve_traffic import HalveTraffic
from tvm_qfp8.relay_passes.lower_groups import LowerGroups
from tvm_qfp8.relay_passes.quantize_linear import codes_constant
from tvm_qfp8.topi import reference
from tvm_qfp8.topi.conv2d import ConvShape
from tvm_qfp8.topi.isa import instruction_set

RNG = np.random.default_rng(3)
CHANNELS = 20
WEIGHT = random_codes(RNG, (CHANNELS, 1, 1, CHANNELS))
TAPS = random_codes(RNG, (CHANNELS, 3, 3, 1))
A, BIAS = RNG.random(CHANNELS, np.float32) * 1e-4, RNG.standard_normal(CHANNELS, np.float32)
SHAPE = (1, 5, 7, CHANNELS)


def conv(builder, codes, a=A, bias=BIAS):
    """Pointwise convolution of E2M5 codes."""
    constants = (codes_constant(WEIGHT, "E2M5"), relax.const(a), relax.const(bias))
    call = qfp8_ops.conv2d(codes, *constants, strides=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), groups=1)
    return builder.emit(call)


def encoded(builder, x):
    return builder.emit(qfp8_ops.encode(x, get_layout("E2M5"), 0.05))


def residual(builder, codes):
    """Two blocks of a residual network."""
    total = builder.emit(relax.op.nn.relu(conv(builder, codes)))
    for _ in range(2):
        total = builder.emit(relax.op.add(conv(builder, encoded(builder, total)), total))
    return total


def twin(codes, between):
    """``residual`` in NumPy; ``between`` is what is kept of a sum for the next block."""

    def layer(values):
        sums = reference.matmul(values, WEIGHT[:, 0, 0], get_layout("E2M5"), get_layout("E2M5"))
        return reference.scale_and_bias(sums, A, BIAS)

    total = np.maximum(layer(codes), np.float32(0))
    for _ in range(2):
        total = layer(encode(total, np.float32(0.05), "E2M5")) + between(total)
    return total


def rounded(mod, dtype="float16"):
    """The number of tensors that are rounded to ``dtype``; none is to another."""
    values = [binding.value for binding in HalveTraffic()(mod)["main"].body.blocks[0].bindings]
    dtypes = [str(value.attrs["dtype"]) for value in values if op_name(value) == "relax.qfp8.halve"]
    assert set(dtypes) <= {dtype}
    return len(dtypes)


@pytest.mark.parametrize("target", [*TARGETS.values(), TILES], ids=[*TARGETS, "amx"])
def test_residual_sums_are_kept_as_float16(target):
    if not machine_runs(target):
        pytest.skip("this CPU has no such instructions")
    mod = HalveTraffic()(program([(SHAPE, "E2M5")], residual))
    codes = random_codes(RNG, SHAPE)
    found = run(build(mod, target), codes)[0]
    np.testing.assert_array_equal(found, twin(codes, lambda x: x.astype(np.float16).astype(np.float32)))
    assert not np.array_equal(found, twin(codes, lambda x: x))


@pytest.mark.parametrize(
    "name, features, kept",
    [
        ("avx2", ["f16c"], "float16"),
        ("avx2", [], "float32"),
        ("sse2", [], "float32"),
        ("neon", [], "float16"),
        ("generic", [], "float32"),
        ("cuda", [], "float32"),
    ],
)
def test_the_target_decides_how_they_are_stored(name, features, kept):
    mod = HalveTraffic()(program([(SHAPE, "E2M5")], residual))
    lowered = LowerGroups(instruction_set(name, features), 1)(mod)
    dtypes = []
    for binding in lowered["main"].body.blocks[0].bindings:
        parts = getattr(binding.value.ty, "fields", [binding.value.ty])
        dtypes += [str(part.dtype) for part in parts if isinstance(binding.value, relax.Call)]
    assert dtypes.count(kept) == (3 if kept == "float32" else 2) and set(dtypes) == {kept, "uint8", "float32"}


def test_pooling_and_concatenation_read_float16():
    def emit(builder, codes):
        x = conv(builder, codes)
        both = builder.emit(relax.op.concat([x, builder.emit(relax.op.nn.relu(conv(builder, codes)))], -1))
        return relax.op.nn.max_pool2d(both, (2, 2), strides=(2, 2), layout="NHWC")

    mod = program([(SHAPE, "E2M5")], emit)
    assert rounded(mod) == 3
    codes = random_codes(RNG, SHAPE)
    exact, found = (run(build(one, "native"), codes)[0] for one in (mod, HalveTraffic()(mod)))
    np.testing.assert_array_equal(found, exact.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("factor, expected", [(1, 1), (1e4, 0), (1e-6, 0)])
def test_what_float16_may_not_hold_stays(factor, expected):
    """Too large, or so small that its steps there are coarse."""

    def emit(builder, codes):
        x = conv(builder, codes, A * np.float32(factor), BIAS * np.float32(factor))
        return relax.op.add(conv(builder, encoded(builder, x)), x)

    assert rounded(program([(SHAPE, "E2M5")], emit)) == expected


def test_bounds_follow_operators():
    def emit(builder, codes):
        x = builder.emit(relax.op.nn.leakyrelu(conv(builder, codes), 0.1))
        x = builder.emit(relax.op.maximum(builder.emit(relax.op.negative(x)), relax.const(BIAS)))
        x = builder.emit(relax.op.clip(builder.emit(relax.op.multiply(x, relax.const(BIAS))), -3.0, 6.0))
        x = builder.emit(qfp8_ops.interpolate(x, "silu", 1e-3))
        return relax.op.add(conv(builder, encoded(builder, x)), x)

    assert rounded(program([(SHAPE, "E2M5")], emit)) == 1


def residual_of_run_time(builder, x, by_rows=True):
    """Two blocks of a residual network that finds its scales at run time."""
    weight, a, bias = codes_constant(WEIGHT, "E2M5"), relax.const(A), relax.const(BIAS)
    ones = relax.const(np.ones(CHANNELS, np.float32))
    layout = get_layout("E2M5")

    def block(x):
        encode = qfp8_ops.encode_rows(x, ones, layout) if by_rows else qfp8_ops.encode_samples(x, layout)
        both = builder.emit(encode)
        codes, scales = (builder.emit(relax.TupleGetItem(both, part)) for part in range(2))
        window = dict(strides=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), groups=1)
        return builder.emit(qfp8_ops.conv2d(codes, weight, a, bias, **window, scales=scales))

    total = builder.emit(relax.op.nn.relu(block(x)))
    for _ in range(2):
        total = builder.emit(relax.op.add(block(total), total))
    return total


def twin_of_run_time(x, by_rows=True):
    def block(x):
        codes, scales = (reference.encode_rows if by_rows else reference.encode_samples)(
            x, get_layout("E2M5")
        )
        sums = reference.matmul(codes, WEIGHT[:, 0, 0], get_layout("E2M5"), get_layout("E2M5"))
        return reference.scale_and_bias(sums, A, BIAS, scales if by_rows else scales[:, None, None])

    total = np.maximum(block(x), np.float32(0))
    for _ in range(2):
        kept = total.astype(ml_dtypes.bfloat16).astype(np.float32)
        total = block(kept) + kept
    return total


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("target", [*TARGETS.values(), TILES], ids=[*TARGETS, "amx"])
def test_sums_of_no_proved_range_are_kept_as_bfloat16(target, by_rows):
    if not machine_runs(target):
        pytest.skip("this CPU has no such instructions")
    plain = program([(SHAPE, None)], lambda *arguments: residual_of_run_time(*arguments, by_rows=by_rows))
    assert rounded(plain, "bfloat16") == 2
    x = RNG.standard_normal(SHAPE, np.float32) * np.float32(1e6)
    found = run(build(HalveTraffic()(plain), target), x)[0]
    np.testing.assert_array_equal(found, twin_of_run_time(x, by_rows))


def depthwise_of_run_time(builder, x):
    """What a pointwise convolution gives, then a depthwise one that reads it as it is."""
    ones = relax.const(np.ones(CHANNELS, np.float32))
    both = builder.emit(qfp8_ops.encode_rows(x, ones, get_layout("E2M5")))
    codes, scales = (builder.emit(relax.TupleGetItem(both, part)) for part in range(2))
    window = dict(strides=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), groups=1)
    constants = codes_constant(WEIGHT, "E2M5"), relax.const(A), relax.const(BIAS)
    y = builder.emit(qfp8_ops.conv2d(codes, *constants, **window, scales=scales))
    window |= dict(padding=(1, 1, 1, 1), groups=CHANNELS)
    return qfp8_ops.conv2d(y, codes_constant(TAPS, "E2M5"), *constants[1:], **window)


@pytest.mark.parametrize("target", [*TARGETS.values(), TILES], ids=[*TARGETS, "amx"])
def test_windows_read_large_images_in_half(target):
    if not machine_runs(target):
        pytest.skip("this CPU has no such instructions")
    shape = (1, 128, 103, CHANNELS)
    plain = program([(shape, None)], depthwise_of_run_time)
    assert rounded(plain, "bfloat16") == 1
    x = RNG.standard_normal(shape, np.float32)
    found = run(build(HalveTraffic()(plain), target), x)[0]

    codes, scales = reference.encode_rows(x, get_layout("E2M5"))
    sums = reference.matmul(codes, WEIGHT[:, 0, 0], get_layout("E2M5"), get_layout("E2M5"))
    kept = reference.scale_and_bias(sums, A, BIAS, scales).astype(ml_dtypes.bfloat16).astype(np.float32)
    window = ConvShape(
        *shape, CHANNELS, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), CHANNELS, None, get_layout("E2M5")
    )
    taps = decode_grid(TAPS, get_layout("E2M5")).astype(np.float32)
    expected = reference.scale_and_bias(reference.float_conv2d(kept, taps, window), A, BIAS)
    np.testing.assert_array_equal(found, expected)


def test_windows_read_small_images_as_they_are():
    assert rounded(program([(SHAPE, None)], depthwise_of_run_time), "bfloat16") == 0


@pytest.mark.parametrize("name, kept", [("sse2", "uint16"), ("neon", "uint16"), ("cuda", "float32")])
def test_all_cpus_keep_bfloat16(name, kept):
    mod = HalveTraffic()(program([(SHAPE, None)], residual_of_run_time))
    lowered = LowerGroups(instruction_set(name, []), 1)(mod)
    values = [binding.value for binding in lowered["main"].body.blocks[0].bindings]
    dtypes = {str(value.ty.dtype) for value in values if isinstance(value.ty, relax.TensorType)}
    assert dtypes == {kept, "float32", "uint8"}


def test_what_is_only_encoded_stays():
    def emit(builder, x):
        ones = relax.const(np.ones(CHANNELS, np.float32))
        total = residual_of_run_time(builder, x)
        return builder.emit(qfp8_ops.encode_rows(total, ones, get_layout("E2M5")))

    assert rounded(program([(SHAPE, None)], emit), "bfloat16") == 2


@pytest.mark.parametrize("between", ["float32", "result", "softmax", "a factor"])
def test_what_is_not_known_or_read_otherwise_stays(between):
    def emit(builder, codes, x):
        if between == "float32":
            y = builder.emit(relax.op.add(x, relax.const(BIAS)))
            return relax.op.add(conv(builder, encoded(builder, y)), y)
        y = conv(builder, codes)
        total = builder.emit(relax.op.add(conv(builder, encoded(builder, y)), y))
        if between == "result":
            return relax.Tuple([total, y])
        if between == "softmax":
            return relax.Tuple([total, builder.emit(relax.op.nn.softmax(y, -1))])
        scaled = builder.emit(relax.op.multiply(total, x))
        return relax.op.add(conv(builder, encoded(builder, scaled)), scaled)

    mod = program([(SHAPE, "E2M5"), (SHAPE, None)], emit)
    assert rounded(mod) == (1 if between == "a factor" else 0)
