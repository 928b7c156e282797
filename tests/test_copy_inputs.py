"""Several inputs that cut a graph of kernels are copied, others are not."""

import onnx
import pytest
from test_cuda_modules import lowered_for_cuda
from tvm import relax


@pytest.mark.parametrize(
    "inputs, body, copies",
    [
        ("float[2, 3] a, float[2, 3] b", "p = Add (a, b)  y = Relu (p)", 0),
        ("float[2, 3] a", "p = Equal (a, one)  q = Where (p, a, one)  y = Sum (q, q, a)", 0),
        ("float[2, 3] a, float[2, 3] b", "p = Equal (a, b)  q = Where (p, a, one)  y = Sum (q, q, b)", 1),
    ],
)
def test_inputs_are_copied_where_several_kernels_read_them(inputs, body, copies):
    text = f"g ({inputs}) => (float[2, 3] y) <float[1] one = {{1}}> {{ {body} }}"
    graph = onnx.parser.parse_graph(text)
    network = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    lowered = lowered_for_cuda(network, None)
    bindings = lowered["main"].body.blocks[0].bindings
    called = [str(b.value.args[0].name_hint) for b in bindings if isinstance(b.value, relax.Call)]
    assert sum(name.startswith("copy") for name in called) == copies
