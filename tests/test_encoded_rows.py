"""On GPUs a norm's kernel encodes its rows, too."""

import numpy as np
import onnx
import pytest
from cuda_emulator import run_program
from test_cuda import NEEDS_COMPILER
from test_cuda_modules import lowered_for_cuda

import tvm_qfp8


def normed(more: str) -> onnx.ModelProto:
    """A norm that a dense layer and, with ``more``, others read."""
    rng = np.random.default_rng(6)
    body = f"n = LayerNormalization <axis = -1> (x, one, zero)  d = MatMul (n, w)  {more}"
    graph = onnx.parser.parse_graph(f"g (float[1, 5, 40] x) => (float[1, 5, 40] y) {{ {body} }}")
    constants = {
        "one": rng.uniform(0.5, 2, 40),
        "zero": rng.standard_normal(40),
        "w": rng.standard_normal((40, 40)),
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
    x = np.random.default_rng(7).standard_normal((1, 5, 40), np.float32)
    (found,) = run_program(lowered, [x], tmp_path)
    np.testing.assert_array_equal(found, tvm_qfp8.compile(normed(more), "native").run({"x": x})[0])
