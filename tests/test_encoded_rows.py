"""Kernels that finish row after row encode them, too."""

import numpy as np
import onnx
import pytest
from cuda_emulator import run_program
from quantized_programs import RUNS, TARGETS, build, program, run
from relax_programs import random
from test_cuda import NEEDS_COMPILER
from test_cuda_modules import lowered_for_cuda
from tvm import relax
from tvm.relax import op as R

import tvm_qfp8
from tvm_qfp8.format import get_layout
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.topi import reference


def check(inputs, values, emit, factors, layout, is_read, target, threads):
    """The kernel gives the rows' codes and scales, and the rows, ``emit(builder, *x)``, where more reads them."""

    def with_encode(builder, *x):
        rows = emit(builder, *x)
        encoded = builder.emit(qfp8_ops.encode_rows(rows, relax.const(factors), get_layout(layout)))
        parts = [builder.emit(relax.TupleGetItem(encoded, index)) for index in range(2)]
        return relax.Tuple([*parts, *([rows] if is_read else [])])

    executable = build(program([(x.shape, None) for x in inputs], with_encode), target, threads)
    found = run(executable, *inputs)
    expected = [*reference.encode_rows(values, get_layout(layout), factors), values]
    assert len(found) == 2 + is_read
    for got, wanted in zip(found, expected, strict=False):
        np.testing.assert_array_equal(got, wanted)


SHAPES = [(1, 1, 1), (1, 5, 40), (1, 300, 7), (2, 700, 130)]  # threads, rows, channels


@pytest.mark.parametrize("isa", RUNS)
@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize("threads, rows, channels", SHAPES)
def test_rows_of_a_concatenation(isa, threads, is_read, rows, channels):
    parts = [random(rows, channels), random(rows, 3, seed=1), random(rows, 2 * channels, seed=2)]
    parts[0][0] *= 1000
    columns = 3 * channels + 3
    factors, slope = np.exp2(random(columns, seed=3)), random(columns, seed=4)

    def emit(builder, *x):
        joined = builder.emit(R.concat([*x], axis=-1))
        return builder.emit(R.nn.relu(builder.emit(R.multiply(joined, relax.const(slope)))))

    values = np.maximum(np.concatenate(parts, axis=1) * slope, np.float32(0))
    check(parts, values, emit, factors, "UE1M7", is_read, TARGETS[isa], threads)


@pytest.mark.parametrize("isa", RUNS)
@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize("threads, rows, channels", SHAPES)
def test_rows_of_a_norm(isa, threads, is_read, rows, channels):
    x, gamma, beta = random(rows, channels), random(channels, seed=1), random(channels, seed=2)
    factors = np.exp2(random(channels, seed=3))

    def emit(builder, x):
        return builder.emit(
            R.nn.layer_norm(x, relax.const(gamma), relax.const(beta), axes=[-1], epsilon=1e-5)
        )

    values = reference.layer_norm(x, gamma, beta, 1e-5)
    check([x], values, emit, factors, "E3M4", is_read, TARGETS[isa], threads)


@pytest.mark.parametrize("isa", RUNS)
@pytest.mark.parametrize("threads, rows, channels", [*SHAPES, (1, 3, 16)])
def test_rows_of_a_softmax(isa, threads, rows, channels):
    """One kernel, with the codes and scales that two give; a row may hold minus infinity only."""
    x = random(rows, channels) * np.linspace(0.1, 30, rows, dtype=np.float32)[:, None]
    x[rows // 2] = -np.inf
    x[-1, ::2] = -np.inf
    ones, layout = np.ones(channels, np.float32), get_layout("UE2M6")

    def encoded(builder, rows):
        both = builder.emit(qfp8_ops.encode_rows(rows, relax.const(ones), layout))
        return relax.Tuple([builder.emit(relax.TupleGetItem(both, index)) for index in range(2)])

    def together(builder, x):
        return encoded(builder, builder.emit(R.nn.softmax(x, -1)))

    def softmax(builder, x):
        return builder.emit(R.nn.softmax(x, -1))

    mod = build(program([(x.shape, None)], together), TARGETS[isa], threads)
    (shares,) = run(build(program([(x.shape, None)], softmax), TARGETS[isa], threads), x)
    expected = run(build(program([(x.shape, None)], encoded), TARGETS[isa], threads), shares)
    for got, wanted in zip(run(mod, x), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def normed(more: str) -> onnx.ModelProto:
    """A norm that a dense layer and, with ``more``, others read; of so many channels as are not rotated."""
    rng = np.random.default_rng(6)
    body = f"n = LayerNormalization <axis = -1> (x, one, zero)  d = MatMul (n, w)  {more}"
    graph = onnx.parser.parse_graph(f"g (float[1, 5, 36] x) => (float[1, 5, 36] y) {{ {body} }}")
    constants = {
        "one": rng.uniform(0.5, 2, 36),
        "zero": rng.standard_normal(36),
        "w": rng.standard_normal((36, 36)),
    }
    graph.initializer.extend(
        onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)


@NEEDS_COMPILER
@pytest.mark.parametrize("more", ["y = Relu (d)", "y = Add (d, n)"])
def test_a_norm_encodes_its_rows(more, tmp_path):
    lowered = lowered_for_cuda(normed(more), None)
    names = [var.name_hint for var in lowered.get_global_vars()]
    assert "layer_norm_encode_rows" in names and "encode_rows" not in names
    x = np.random.default_rng(7).standard_normal((1, 5, 36), np.float32)
    (found,) = run_program(lowered, [x], tmp_path)
    np.testing.assert_array_equal(found, tvm_qfp8.compile(normed(more), "native").run({"x": x})[0])
