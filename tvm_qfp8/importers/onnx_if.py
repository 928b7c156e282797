"""``If`` nodes: the branch taken replaces the node; where values of inputs decide, both are computed."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tvm_qfp8.errors import UnsupportedOperatorError
from tvm_qfp8.importers.onnx_operators import describe, inferred_shapes
from tvm_qfp8.importers.onnx_qdq import constant_tensors

CHOICE = "choice of "
"""Begins the names of the nodes that choose; the simplifier keeps names."""


def fold_if(model: onnx.ModelProto) -> bool:
    """Put the branches that constants decide in place; whether there was anything to do."""
    constants = constant_tensors(model)
    graph = model.graph
    nodes: list[onnx.NodeProto] = []
    folded = False
    for node in graph.node:
        condition = constants.get(node.input[0]) if node.op_type == "If" else None
        if condition is None:
            nodes.append(node)
            continue
        folded = True
        taken = "then_branch" if numpy_helper.to_array(condition).reshape(-1)[0] else "else_branch"
        for source, name in zip(_inlined(graph, node, taken, nodes), node.output, strict=True):
            nodes.append(helper.make_node("Identity", [source], [name]))
    del graph.node[:]
    graph.node.extend(nodes)
    return folded


def choose_branches(model: onnx.ModelProto) -> bool:
    """Compute both branches of what is left and choose by the condition; whether there was anything to do.

    Raises
    ------
    UnsupportedOperatorError
        A switch decides, an integer among the inputs: to fix it costs nothing, to compute both branches does.
    """
    graph = model.graph
    nodes: list[onnx.NodeProto] = []
    chosen = False
    for node in graph.node:
        if node.op_type != "If":
            nodes.append(node)
            continue
        chosen = True
        switches = _switches(graph, node.input[0])
        if switches:
            raise UnsupportedOperatorError(
                f"{describe(node)} depends on the value of input {switches[0]!r}; give it: "
                f"params={{{switches[0]!r}: ...}}, on the command line --param {switches[0]}=VALUE"
            )
        scalar = f"{node.output[0]}_condition"
        graph.initializer.append(numpy_helper.from_array(np.array([], np.int64), f"{scalar}_shape"))
        nodes.append(helper.make_node("Reshape", [node.input[0], f"{scalar}_shape"], [scalar]))
        branches = [_inlined(graph, node, branch, nodes) for branch in ("then_branch", "else_branch")]
        for then, other, name in zip(*branches, node.output, strict=True):
            nodes.append(helper.make_node("Where", [scalar, then, other], [name], name=f"{CHOICE}{name}"))
    del graph.node[:]
    graph.node.extend(nodes)
    return chosen


def check_choices(model: onnx.ModelProto) -> None:
    """Refuse branches of different shapes: a choice would widen one of them.

    Raises
    ------
    UnsupportedOperatorError
    """
    choices = [node for node in model.graph.node if node.name.startswith(CHOICE)]
    shapes = inferred_shapes(model) if choices else {}
    for node in choices:
        then, other = (shapes.get(name) for name in node.input[1:])
        if then is None or then != other:
            raise UnsupportedOperatorError(
                f"operator If (output {node.name.removeprefix(CHOICE)!r}) has branches of the shapes {then} and "
                f"{other}; shapes are static: cut the model before it"
            )


def _inlined(
    graph: onnx.GraphProto, node: onnx.NodeProto, branch: str, nodes: list[onnx.NodeProto]
) -> list[str]:
    """Appends a branch's nodes and constants; the names of its results."""
    inner = next(a.g for a in node.attribute if a.name == branch)
    prefix = f"{node.output[0]}/{branch}/"
    _rename(inner, {name: prefix + name for name in _defined(inner)}, prefix)
    graph.initializer.extend(inner.initializer)
    nodes.extend(inner.node)
    return [value.name for value in inner.output]


def _graphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]


def _defined(graph: onnx.GraphProto) -> set[str]:
    """Names of values that a graph makes, in its nodes' graphs too; other names are of the graph around it."""
    names = {value.name for value in (*graph.input, *graph.initializer)}
    for node in graph.node:
        names.update(filter(None, node.output), *(_defined(inner) for inner in _graphs(node)))
    return names


def _rename(graph: onnx.GraphProto, names: dict[str, str], prefix: str) -> None:
    for value in (*graph.input, *graph.initializer, *graph.output):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.name = f"{prefix}{node.name}" if node.name else ""
        for values in (node.input, node.output):
            values[:] = [names.get(name, name) for name in values]
        for inner in _graphs(node):
            _rename(inner, names, prefix)


def _switches(graph: onnx.GraphProto, name: str) -> list[str]:
    """The inputs that a value depends on, if all of them are single integers."""
    producers = {output: node for node in graph.node for output in node.output}
    inputs = {value.name: value.type.tensor_type for value in graph.input}
    found, open_names = [], [name]
    for current in open_names:
        if current in inputs:
            found.append(current)
        elif current in producers:
            open_names += [each for each in producers[current].input if each not in open_names]
    integers = (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)
    single = all(
        inputs[each].elem_type in integers and all(dim.dim_value == 1 for dim in inputs[each].shape.dim)
        for each in found
    )
    return found if single else []
