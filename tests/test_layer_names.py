"""Layers are called what the file calls them, in the report, in ``skip`` and in profiles."""

import numpy as np
import onnx
import pytest
from models import cnn, images, model
from onnx import helper, numpy_helper

import tvm_qfp8
from tvm_qfp8.config import Config
from tvm_qfp8.errors import CalibrationError
from tvm_qfp8.profiling import profile

RNG = np.random.default_rng(0)


def _layers(compiled):
    return {layer.name: layer.operator for layer in compiled.report.layers}


def _mlp(names: tuple[str, ...] = ("", "", "", ""), namespaces: tuple[str, ...] = ()) -> onnx.ModelProto:
    """MatMul, Add, Gelu, MatMul; the first two are one layer."""
    weights = {
        "w": RNG.standard_normal((8, 16)).astype("float32"),
        "b": RNG.standard_normal(16).astype("float32"),
        "v": RNG.standard_normal((16, 4)).astype("float32"),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"], name=names[0]),
        helper.make_node("Add", ["product", "b"], ["sum"], name=names[1]),
        helper.make_node("Tanh", ["sum"], ["act"], name=names[2]),
        helper.make_node("MatMul", ["act", "v"], ["y"], name=names[3]),
    ]
    made = model(nodes, {"x": (3, 8)}, {"y": (3, 4)}, weights)
    for node, namespace in zip(made.graph.node, namespaces, strict=False):
        node.metadata_props.add(key="namespace", value=namespace)
    return made


def test_nodes_of_a_file_give_their_names():
    names = ("/encoder/layer.0/fc/MatMul", "/encoder/layer.0/fc/Add", "/encoder/act/Tanh", "/head/MatMul")
    assert _layers(tvm_qfp8.compile(_mlp(names))) == {
        "/encoder/layer.0/fc/MatMul": "matmul",
        "/encoder/act/Tanh": "tanh",
        "/head/MatMul": "matmul",
    }


def test_without_names_results_give_theirs():
    assert [*_layers(tvm_qfp8.compile(_mlp()))] == ["product", "act", "y"]


def test_modules_that_the_exporter_notes_go_before_its_own_names():
    linear = ": Net/encoder.0: torch.nn.modules.linear.Linear/linear: aten.linear.default"
    namespaces = (linear, linear, ": Net/encoder: Block/tanh: aten.tanh.default")
    found = tvm_qfp8.compile(_mlp(("node_MatMul_1", "node_linear", "node_tanh", "node_matmul"), namespaces))
    assert [*_layers(found)] == ["encoder.0", "encoder.tanh", "node_matmul"]


def test_names_survive_folded_norms_layouts_and_equal_names():
    file = cnn()
    for node in file.graph.node:
        node.name = "same" if node.op_type == "Conv" else f"{node.op_type}.0"
    found = _layers(tvm_qfp8.compile(file, calibration=images(2)))
    assert [name for name, operator in found.items() if operator == "conv2d"] == ["same", "same:2", "same:3"]
    assert found["Gemm.0"] == "matmul" and found["Softmax.0"] == "softmax"


def test_skip_takes_the_names_with_their_dots():
    names = ("layer.0.fc", "layer.0.add", "layer.0.act", "layer.1.fc")
    file, samples = _mlp(names), [{"x": RNG.standard_normal((3, 8)).astype("float32")} for _ in range(2)]
    for pattern in ("layer.1.fc", "layer.1.*"):
        report = tvm_qfp8.compile(file, calibration=samples, config=Config(skip=(pattern,))).report
        became = {layer.name: layer.became for layer in report.layers}
        assert became["layer.1.fc"] == "float32" and became["layer.0.fc"] == "QFP8"


@pytest.mark.parametrize("pattern", ["layer.1.fx", "lv[0-9]", "layer_1_fc"])
def test_a_pattern_without_a_layer_is_refused(pattern):
    file = _mlp(("layer.0.fc", "layer.0.add", "layer.0.act", "layer.1.fc"))
    with pytest.raises(CalibrationError, match=r"no layer is called .*such as 'layer\.[01]\.fc'"):
        tvm_qfp8.compile(file, config=Config(skip=(pattern,)))


def test_modules_of_torch_give_their_paths():
    torch = pytest.importorskip("torch", reason="torch is an extra")

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
            self.act, self.fc = torch.nn.GELU(), torch.nn.Linear(6, 4)

        def forward(self, x):
            y = self.fc(self.act(self.norm(self.conv(x))))
            return self.act(y @ y.transpose(-1, -2))

    net = torch.nn.Sequential(Block(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5, bias=False)).eval()
    found = _layers(tvm_qfp8.compile(torch.export.export(net, (torch.randn(1, 3, 8, 8),))))
    linear = [name for name, operator in found.items() if operator in ("conv2d", "matmul")]
    assert linear[:2] == ["0.conv", "0.fc"] and linear[2].startswith("0.") and linear[3:] == ["2"]
    assert [name for name, operator in found.items() if operator == "gelu"] == ["0.act", "0.act:2"]


def test_a_profile_says_which_layer_a_kernel_is_for():
    file = cnn()
    for index, node in enumerate(file.graph.node):
        node.name = f"{node.op_type.lower()}.{index}"
    compiled = tvm_qfp8.compile(file, calibration=images(2))
    kernels = profile(compiled, images(1)[0], runs=2)
    assert all(kernel.layer for kernel in kernels)
    named = {kernel.layer: kernel.kernel for kernel in kernels}
    assert named["conv.0"].startswith("conv2d") and named["gemm.9"].startswith("matmul")


def test_operators_are_skipped_as_names_are():
    """Tables of embeddings, too."""
    table = numpy_helper.from_array(RNG.standard_normal((300, 16)).astype("float32"), "table")
    ids = helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, (5,))
    result = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (5, 16))
    nodes = [helper.make_node("Gather", ["table", "ids"], ["y"], name="words")]
    made = helper.make_model(helper.make_graph(nodes, "test", [ids], [result], [table]), ir_version=8)
    reports = [
        tvm_qfp8.compile(made, config=Config(skip=skip)).report for skip in ((), ("words",), ("relax.take",))
    ]
    assert [[layer.name for layer in report.layers] for report in reports] == [["words"], [], []]
