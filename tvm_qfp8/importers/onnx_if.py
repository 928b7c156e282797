"""``If`` nodes whose condition is constant: the branch taken replaces the node."""

from __future__ import annotations

import onnx
from onnx import helper, numpy_helper
from onnx.compose import add_prefix_graph

from tvm_qfp8.importers.onnx_qdq import constant_tensors


def fold_if(model: onnx.ModelProto) -> bool:
    """Put the branches in place; whether there was anything to do."""
    constants = constant_tensors(model)
    graph = model.graph
    nodes: list[onnx.NodeProto] = []
    folded = False
    for position, node in enumerate(graph.node):
        condition = constants.get(node.input[0]) if node.op_type == "If" else None
        if condition is None:
            nodes.append(node)
            continue
        folded = True
        taken = "then_branch" if numpy_helper.to_array(condition).reshape(-1)[0] else "else_branch"
        branch = next(a.g for a in node.attribute if a.name == taken)
        prefix = f"{node.output[0]}/{taken}_{position}/"
        inner = add_prefix_graph(branch, prefix)
        graph.initializer.extend(inner.initializer)
        nodes.extend(inner.node)
        own = {t.name for t in inner.initializer} | {name for n in inner.node for name in n.output}
        for value, name in zip(inner.output, node.output, strict=True):
            # A branch may hand on a value of the graph around it, which keeps its name.
            source = value.name if value.name in own else value.name.removeprefix(prefix)
            nodes.append(helper.make_node("Identity", [source], [name]))
    del graph.node[:]
    graph.node.extend(nodes)
    return folded
