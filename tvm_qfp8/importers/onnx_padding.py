"""Padding written as numbers into convolutions and poolings, where TVM's importer adds operators or errs.

``auto_pad`` and constant ``Pad`` nodes become attributes, ``ceil_mode`` padding at the end, the ``output_shape`` of a
transposed convolution the padding that gives it.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper, numpy_helper

from tvm_qfp8.importers.onnx_operators import attributes, inferred_shapes

POOLING = ("MaxPool", "AveragePool")


def explicit_padding(model: onnx.ModelProto) -> None:
    """Rewrite a simplified model with static shapes, in place."""
    shapes = inferred_shapes(model)
    weights = {t.name: list(t.dims) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose", *POOLING):
            continue
        given = attributes(node)
        spatial = shapes.get(node.input[0], [])[2:]
        kernel = given.get("kernel_shape") or weights.get(node.input[1], [])[2:]
        if not spatial or not all(spatial) or len(kernel) != len(spatial):
            continue
        if node.op_type == "ConvTranspose":
            if "output_shape" in given:
                _output_shape(node, spatial, kernel)
            continue
        if given.get("auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER"):
            _auto_pad(node, spatial, kernel)
        if given.get("ceil_mode", 0):
            _ceil_mode(node, spatial, kernel)
    _pad_nodes(model)


def _set(node: onnx.NodeProto, name: str, value: Any) -> None:
    _remove(node, name)
    node.attribute.append(helper.make_attribute(name, value))


def _remove(node: onnx.NodeProto, name: str) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


def _windows(node: onnx.NodeProto, spatial: list[int], kernel: list[int]) -> list[tuple[int, int, int]]:
    """(size, stride, extent of the window) along each spatial axis."""
    given = attributes(node)
    strides = given.get("strides", [1] * len(spatial))
    dilations = given.get("dilations", [1] * len(spatial))
    extents = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    return list(zip(spatial, strides, extents, strict=True))


def _auto_pad(node: onnx.NodeProto, spatial: list[int], kernel: list[int]) -> None:
    begin, end = [], []
    for size, stride, extent in _windows(node, spatial, kernel):
        total = max((-(-size // stride) - 1) * stride + extent - size, 0)
        small, large = total // 2, total - total // 2
        upper = attributes(node)["auto_pad"] == b"SAME_UPPER"
        begin.append(small if upper else large)
        end.append(large if upper else small)
    _remove(node, "auto_pad")
    _set(node, "pads", begin + end)


def _ceil_mode(node: onnx.NodeProto, spatial: list[int], kernel: list[int]) -> None:
    """Padding at the end until the last window fits; a window that would begin in that padding is left out."""
    given = attributes(node)
    pads = list(given.get("pads", [0] * (2 * len(spatial))))
    for axis, (size, stride, extent) in enumerate(_windows(node, spatial, kernel)):
        begin, end = pads[axis], pads[axis + len(spatial)]
        count = -(-(size + begin + end - extent) // stride) + 1
        if (count - 1) * stride >= size + begin:
            count -= 1
        needed = (count - 1) * stride + extent - size - begin
        if needed > end and given.get("count_include_pad", 0):
            return  # an average counts the padding of the model, but not this one
        pads[axis + len(spatial)] = max(needed, 0)
    _remove(node, "ceil_mode")
    _set(node, "pads", pads)


def _output_shape(node: onnx.NodeProto, spatial: list[int], kernel: list[int]) -> None:
    """The specification of ConvTranspose, solved for the padding."""
    given = attributes(node)
    extra = list(given.get("output_padding", [0] * len(spatial)))
    wanted = given["output_shape"][-len(spatial) :]
    begin, end = [], []
    for axis, (size, stride, extent) in enumerate(_windows(node, spatial, kernel)):
        total = stride * (size - 1) + extra[axis] + extent - wanted[axis]
        extra[axis] += max(-total, 0)
        small, large = max(total, 0) // 2, max(total, 0) - max(total, 0) // 2
        upper = given.get("auto_pad") == b"SAME_UPPER"
        begin.append(small if upper else large)
        end.append(large if upper else small)
    for name in ("output_shape", "auto_pad"):
        _remove(node, name)
    _set(node, "pads", begin + end)
    _set(node, "output_padding", extra)


def _pad_nodes(model: onnx.ModelProto) -> None:
    constants = {t.name: t for t in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {o.name for o in model.graph.output}
    for node in list(model.graph.node):
        if node.op_type != "Pad" or attributes(node).get("mode", b"constant") != b"constant":
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
        plain = all(attributes(u).get("auto_pad", b"NOTSET") == b"NOTSET" for u in users)
        if node.output[0] in outputs or not (fits and spatial_only and plain):
            continue
        extra = [int(w) for w in (*widths[2:rank], *widths[rank + 2 :])]
        for user in users:
            own = list(attributes(user).get("pads", [0] * len(extra)))
            _set(user, "pads", [a + b for a, b in zip(own, extra, strict=True)])
            user.input[0] = node.input[0]
        model.graph.node.remove(node)
