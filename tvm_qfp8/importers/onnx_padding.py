"""Padding written into convolutions and poolings themselves, where TVM's importer would add operators for it."""

from __future__ import annotations

import onnx
from onnx import helper, numpy_helper, shape_inference


def explicit_padding(model: onnx.ModelProto) -> None:
    """Replace ``auto_pad`` by numbers and take constant zero ``Pad`` nodes into the convolutions that read them."""
    _auto_pad(model)
    _pad_nodes(model)


def _attributes(node: onnx.NodeProto) -> dict:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _set(node: onnx.NodeProto, name: str, value) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def _remove(node: onnx.NodeProto, name: str) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


def _auto_pad(model: onnx.ModelProto) -> None:
    nodes = [
        n for n in model.graph.node if _attributes(n).get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
    ]
    nodes = [n for n in nodes if n.op_type in ("Conv", "MaxPool", "AveragePool")]
    if not nodes:
        return
    inferred = shape_inference.infer_shapes(model).graph
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    weights = {t.name: list(t.dims) for t in model.graph.initializer}
    for node in nodes:
        attributes = _attributes(node)
        spatial = shapes.get(node.input[0], [])[2:]
        kernel = attributes.get("kernel_shape") or weights.get(node.input[1], [])[2:]
        if not spatial or not all(spatial) or len(kernel) != len(spatial):
            continue
        strides = attributes.get("strides", [1] * len(spatial))
        dilations = attributes.get("dilations", [1] * len(spatial))
        begin, end = [], []
        for size, k, s, d in zip(spatial, kernel, strides, dilations, strict=True):
            total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
            small, large = total // 2, total - total // 2
            upper = attributes["auto_pad"] == b"SAME_UPPER"
            begin.append(small if upper else large)
            end.append(large if upper else small)
        _remove(node, "auto_pad")
        _set(node, "pads", begin + end)


def _pad_nodes(model: onnx.ModelProto) -> None:
    constants = {t.name: t for t in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {o.name for o in model.graph.output}
    for node in list(model.graph.node):
        if node.op_type != "Pad" or _attributes(node).get("mode", b"constant") != b"constant":
            continue
        widths = (
            numpy_helper.to_array(constants[node.input[1]])
            if len(node.input) > 1 and node.input[1] in constants
            else None
        )
        if widths is None or (len(node.input) > 3 and node.input[3]):
            continue
        if len(node.input) > 2 and node.input[2]:
            value = constants.get(node.input[2])
            if value is None or float(numpy_helper.to_array(value).reshape(-1)[0]) != 0:
                continue
        rank = len(widths) // 2
        users = readers.get(node.output[0], [])
        fits = users and all(u.op_type == "Conv" and u.input[0] == node.output[0] for u in users)
        spatial_only = not any(widths[:2]) and not any(widths[rank : rank + 2]) and (widths >= 0).all()
        plain = all(_attributes(u).get("auto_pad", b"NOTSET") == b"NOTSET" for u in users)
        if node.output[0] in outputs or not (fits and spatial_only and plain):
            continue
        extra = [int(w) for w in (*widths[2:rank], *widths[rank + 2 :])]
        for user in users:
            own = list(_attributes(user).get("pads", [0] * len(extra)))
            _set(user, "pads", [a + b for a, b in zip(own, extra, strict=True)])
            user.input[0] = node.input[0]
        model.graph.node.remove(node)
