"""NumPy twins of operators against TVM, and rounding against the format module."""

import math

import numpy as np
import pytest
import tvm
from relax_programs import NHWC, build, constant, random
from tvm import relax
from tvm.relax import op as R

from tvm_qfp8.calibration import evaluate
from tvm_qfp8.calibration.evaluate import Program
from tvm_qfp8.calibration.fake_quantize import fake_quantize
from tvm_qfp8.calibration.fallback import compile_call
from tvm_qfp8.calibration.nonlinear import erf
from tvm_qfp8.calibration.operators import TABLE
from tvm_qfp8.errors import ModelError
from tvm_qfp8.format import LAYOUTS, decode, encode, get_layout


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
    image = emit(R.reshape(x, (2, 5, 80)))
    results.append(emit(R.nn.instance_norm(image, constant(5), constant(5, seed=1), 1, [2])))
    results.append(emit(R.nn.instance_norm(image, constant(5), constant(5, seed=1), 1, [0, 2])))
    results.append(emit(R.nn.group_norm(image, constant(5), constant(5, seed=1), 5, 1, [2])))
    results.append(emit(R.nn.group_norm(image, constant(80), constant(80, seed=1), 4, 2, [1])))
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
    results.append(emit(R.nn.pad(x, [-1, 1, 2, -3], pad_value=1.5)))
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


def test_tvm_runs_operators_on_scalars():
    mod = build({"x": ((), "float32")}, lambda emit, x: emit(R.acos(x)))
    call = mod["main"].body.blocks[0].bindings[0].value
    found = compile_call(mod, call)({"x": np.float32(0.5)})
    np.testing.assert_allclose(found, np.arccos(0.5), rtol=1e-6)
