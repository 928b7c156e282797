"""Exported programs in half or double precision become float32: the calibration and the kernels have one float type."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

OTHER_FLOATS = ("float16", "bfloat16", "float64")


def to_float32(program: Any) -> tuple[Any, list[str]]:
    """The program with float32 weights, casts, inputs and outputs; a note if there was anything to do.

    Runs before the decompositions, which find the types of inner values anew from those of the inputs.
    """
    import torch
    from torch.utils import _pytree as pytree

    others = {getattr(torch, name): name for name in OTHER_FLOATS}
    found: set[str] = set()

    def changed(value: Any) -> Any:
        if isinstance(value, torch.dtype) and value in others:
            found.add(others[value])
            return torch.float32
        if not isinstance(value, torch.Tensor) or value.dtype not in others:
            return value
        found.add(others[value.dtype])
        return torch.nn.Parameter(value.float()) if isinstance(value, torch.nn.Parameter) else value.float()

    graph_module = _copied(program.graph_module)
    for module in graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.args, node.kwargs = pytree.tree_map(changed, (node.args, node.kwargs))
            node.meta["val"] = pytree.tree_map(changed, node.meta.get("val"))
    tensors = [
        {name: changed(value) for name, value in values.items()}
        for values in (program.state_dict, program.constants)
    ]
    if not found:
        return program, []
    program = program._update(
        graph_module, program.graph_signature, state_dict=tensors[0], constants=tensors[1]
    )
    return program, [f"{' and '.join(sorted(found))} became float32, inputs and outputs too"]


def _copied(module: Any) -> Any:
    """A graph module whose nodes may be changed; graphs inside it, of control flow, are copied with it."""
    from torch.fx import GraphModule

    copy = GraphModule(module, deepcopy(module.graph))
    copy.meta.update(module.meta)
    for name, child in module.named_children():
        if isinstance(child, GraphModule):
            setattr(copy, name, _copied(child))
    return copy
