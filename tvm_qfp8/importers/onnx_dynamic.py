"""Models whose activations are quantized as they run: DynamicQuantizeLinear goes, integer products become float ones.

Before::

    codes, scale, zero = DynamicQuantizeLinear(x)
    product = Cast(MatMulInteger(codes, weight_codes, zero, weight_zero)) * (scale * weight_scale)

After, with a scale of 1 for ``x``::

    product = Cast(MatMul(x, weight_codes - weight_zero)) * (1 * weight_scale)

ConvInteger is a Conv likewise, onnxruntime's DynamicQuantizeLSTM an LSTM. A bias that is rounded to the product's codes
before it is added is added as it is.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tvm_qfp8.importers.onnx_qdq import constant_tensors

PRODUCTS = {"MatMulInteger": "MatMul", "ConvInteger": "Conv"}


def strip_dynamic_quantization(model: onnx.ModelProto) -> list[str]:
    """Make such a model float32 again, in place; a note for the report, if there was anything to do."""
    graph = model.graph
    constants = constant_tensors(model)
    source: dict[str, str] = {}
    products: set[str] = set()
    recurrent = 0
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            codes, scale, zero = node.output
            source[codes] = node.input[0]
            graph.initializer.append(numpy_helper.from_array(np.float32(1), scale))
            graph.initializer.append(numpy_helper.from_array(np.uint8(0), zero))
        elif node.op_type == "DynamicQuantizeLSTM" and {node.input[1], node.input[2]} <= set(constants):
            nodes.append(_lstm(graph, node, constants))
            recurrent += 1
        elif _is_product(node, source, constants):
            nodes.append(_in_floats(graph, node, source[node.input[0]], constants))
            products.update(node.output)
        else:
            nodes.append(node)
    _keep_biases(nodes, products)
    del graph.node[:]
    graph.node.extend(nodes)
    notes = []
    if source:
        notes.append(
            f"{len(source)} DynamicQuantizeLinear nodes were removed: their products are imported as float32"
        )
    if recurrent:
        notes.append(f"{recurrent} DynamicQuantizeLSTM nodes are imported as float32")
    return notes


def _keep_biases(nodes: list[onnx.NodeProto], products: set[str]) -> None:
    """Takes the rounding from what is added to products."""
    producers = {name: node for node in nodes for name in node.output}
    for node in nodes:
        if node.op_type != "Add" or products.isdisjoint(node.input):
            continue
        for name in node.input:
            step = producers.get(name)
            while step is not None and step.op_type in ("Reshape", "Unsqueeze", "Cast", "Floor", "Round"):
                if step.op_type == "Cast":
                    step.attribute[0].i = onnx.TensorProto.FLOAT
                elif step.op_type in ("Floor", "Round"):
                    step.op_type = "Identity"
                step = producers.get(step.input[0])


def _is_product(node: onnx.NodeProto, source: dict[str, str], constants: dict[str, onnx.TensorProto]) -> bool:
    return node.op_type in PRODUCTS and node.input[0] in source and node.input[1] in constants


def _in_floats(
    graph: onnx.GraphProto, node: onnx.NodeProto, x: str, constants: dict[str, onnx.TensorProto]
) -> onnx.NodeProto:
    weight = numpy_helper.to_array(constants[node.input[1]]).astype(np.float32)
    if len(node.input) > 3 and node.input[3]:
        zero = numpy_helper.to_array(constants[node.input[3]]).astype(np.float32)
        if node.op_type == "ConvInteger":
            zero = zero.reshape(-1, *[1] * (weight.ndim - 1))
        weight = weight - zero  # a matrix has one for each column
    name = f"{node.output[0]}_weight"
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight), name))
    made = helper.make_node(PRODUCTS[node.op_type], [x, name], node.output, name=node.name)
    made.attribute.extend(node.attribute)
    return made


def _lstm(
    graph: onnx.GraphProto, node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]
) -> onnx.NodeProto:
    """Its weights are codes ``(directions, inputs, gates)``, scale and zero are of each direction, or of each gate."""
    inputs = list(node.input[:8])
    for position, name in ((1, "W"), (2, "R")):
        codes, scale, zero = (
            numpy_helper.to_array(constants[node.input[i]]).astype(np.float32)
            for i in (position, 6 + 2 * position, 7 + 2 * position)
        )
        directions = len(codes)
        weight = (codes - zero.reshape(directions, 1, -1)) * scale.reshape(directions, 1, -1)
        inputs[position] = f"{node.output[0]}_{name}"
        graph.initializer.append(
            numpy_helper.from_array(np.ascontiguousarray(weight.transpose(0, 2, 1)), inputs[position])
        )
    made = helper.make_node("LSTM", inputs, node.output, name=node.name)
    made.attribute.extend(node.attribute)
    return made
