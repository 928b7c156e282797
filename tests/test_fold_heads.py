"""Swaps of tokens and heads before a product of activations are read through, and the bits are the CPU's."""

import numpy as np
import onnx
import pytest
from cuda_emulator import run_program
from test_cuda import NEEDS_COMPILER
from test_cuda_modules import lowered_for_cuda

import tvm_qfp8


def heads() -> onnx.ModelProto:
    """Two tokens of attention with two heads, as exporters write it."""
    rng = np.random.default_rng(5)
    body = """
        queries = MatMul (x, q)
        keys = MatMul (x, k)
        values = MatMul (x, v)
        queries_by_head = Reshape (queries, split)
        keys_by_head = Reshape (keys, split)
        values_by_head = Reshape (values, split)
        q1 = Transpose <perm = [0, 2, 1, 3]> (queries_by_head)
        k1 = Transpose <perm = [0, 2, 3, 1]> (keys_by_head)
        v1 = Transpose <perm = [0, 2, 1, 3]> (values_by_head)
        scores = MatMul (q1, k1)
        shares = Softmax (scores)
        mixed = MatMul (shares, v1)
        together = Transpose <perm = [0, 2, 1, 3]> (mixed)
        y = Reshape (together, joined)
    """
    graph = onnx.parser.parse_graph(f"g (float[1, 5, 16] x) => (float[1, 5, 16] y) {{ {body} }}")
    constants = {name: rng.standard_normal((16, 16), np.float32) * 0.5 for name in "qkv"}
    constants |= {"split": np.array([1, 5, 2, 8]), "joined": np.array([1, 5, 16])}
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize("calibrated", [True, False])
def test_heads_are_read_where_they_lie(calibrated, tmp_path):
    inputs = [{"x": np.random.default_rng(i).standard_normal((1, 5, 16), np.float32)} for i in range(3)]
    calibration = inputs if calibrated else None
    lowered = lowered_for_cuda(heads(), calibration)
    names = [var.name_hint for var in lowered.get_global_vars()]
    assert sum(name.startswith("transpose") for name in names) == 1  # what joins the heads again
    here = tvm_qfp8.compile(heads(), "native", calibration=calibration)
    (found,) = run_program(lowered, [inputs[0]["x"]], tmp_path)
    np.testing.assert_array_equal(found, here.run(inputs[0])[0])
