"""Operators on codes, the other form of a quantized model: written out as float operators between (de)quantizations.

QLinearConv and QLinearMatMul are ONNX's, the rest is onnxruntime's; ``strip_quantization`` takes the rest of the way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tvm_qfp8.importers.onnx_qdq import constant_tensors


@dataclass(frozen=True)
class _Form:
    """The float operator, and where an operator on codes has its inputs (code, scale, zero), bias and (scale, zero)."""

    operator: str
    inputs: tuple[int, ...]
    output: int
    bias: int | None = None


BINARY, UNARY = (0, 3), (0,)
FORMS = {
    "QLinearConv": _Form("Conv", BINARY, 6, bias=8),
    "QLinearMatMul": _Form("MatMul", BINARY, 6),
    "QGemm": _Form("Gemm", BINARY, 7, bias=6),
    "QLinearAdd": _Form("Add", BINARY, 6),
    "QLinearMul": _Form("Mul", BINARY, 6),
    "QLinearAveragePool": _Form("AveragePool", UNARY, 3),
    "QLinearGlobalAveragePool": _Form("GlobalAveragePool", UNARY, 3),
    "QLinearLeakyRelu": _Form("LeakyRelu", UNARY, 3),
    "QLinearSigmoid": _Form("Sigmoid", UNARY, 3),
    "QLinearSoftmax": _Form("Softmax", UNARY, 3),
}

OWN = ("channels_last", "opset")
"""Attributes that the float operators do not have; ``opset`` is the file's."""


def write_out_qlinear(model: onnx.ModelProto) -> None:
    """Replace the operators, in place. What has its channels last, or a computed bias, stays and is refused later."""
    graph = model.graph
    constants = constant_tensors(model)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        form = _form(node)
        if form is None or not _is_constant(node, form.bias, constants):
            nodes.append(node)
            continue
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name not in OWN}
        name = node.output[0]
        floats = []
        for position in form.inputs:
            floats.append(f"{name}_float{position}")
            axis = _axis(form, position, given)
            nodes.append(
                helper.make_node("DequantizeLinear", _triple(node, position), floats[-1:], axis=axis)
            )
        if form.bias is not None and len(node.input) > form.bias and node.input[form.bias]:
            floats.append(f"{name}_bias")
            bias, x_scale, w_scale = (
                numpy_helper.to_array(constants[node.input[i]]) for i in (form.bias, 1, 4)
            )
            array = (bias * (x_scale * w_scale)).astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(array, floats[-1]))
        is_float = len(node.input) <= form.output or not node.input[form.output]
        result = name if is_float else f"{name}_float"
        nodes.append(helper.make_node(form.operator, floats, [result], name=node.name, **given))
        if not is_float:
            quantization = [result, *_triple(node, form.output - 1)[1:]]
            nodes.append(helper.make_node("QuantizeLinear", quantization, [name]))
    del graph.node[:]
    graph.node.extend(nodes)


def _form(node: onnx.NodeProto) -> _Form | None:
    if node.op_type == "QLinearConcat":
        return _Form("Concat", tuple(range(2, len(node.input), 3)), 0)
    channels_last = any(a.name == "channels_last" and a.i for a in node.attribute)
    return None if channels_last else FORMS.get(node.op_type)


def _is_constant(node: onnx.NodeProto, bias: int | None, constants: dict[str, onnx.TensorProto]) -> bool:
    """Whether a bias is one, with the scales that make its codes a number."""
    if bias is None or len(node.input) <= bias or not node.input[bias]:
        return True
    return {node.input[bias], node.input[1], node.input[4]} <= set(constants)


def _triple(node: onnx.NodeProto, position: int) -> list[str]:
    """Names of code, scale and, where there is one, zero."""
    code = node.input[position] if position >= 0 else ""
    return [code, *(name for name in node.input[position + 1 : position + 3] if name)]


def _axis(form: _Form, position: int, given: dict) -> int:
    """Output channels of a weight, which may have a scale for each."""
    if form.operator == "Conv":
        return 0
    return 0 if form.operator == "Gemm" and given.get("transB", 0) and position else -1
