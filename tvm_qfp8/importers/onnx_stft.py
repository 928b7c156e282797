"""Short-time Fourier transforms of real signals as convolutions, whose filters are the windowed sines and cosines."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tvm_qfp8.importers.onnx_operators import attributes, inferred_shapes
from tvm_qfp8.importers.onnx_qdq import constant_tensors


def write_out_stft(model: onnx.ModelProto) -> None:
    """Replace the nodes whose step, length and window are constant, in place; others are refused later."""
    if not any(node.op_type == "STFT" for node in model.graph.node):
        return
    constants, shapes = constant_tensors(model), inferred_shapes(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        given = [*node.input, "", ""][:4]
        is_real = shapes.get(given[0], [])[2:] in ([], [1])
        if node.op_type != "STFT" or not is_real or not set(filter(None, given[1:])) <= set(constants):
            nodes.append(node)
            continue
        step, window, length = (
            numpy_helper.to_array(constants[name]) if name else None for name in given[1:]
        )
        if window is None:
            window = np.ones(int(length), np.float32)  # type: ignore[arg-type]
        filters = _filters(window, bool(attributes(node).get("onesided", 1)))
        name = node.output[0]
        values = {
            "filters": filters,
            "signal_shape": np.array([0, 1, -1]),
            "parts_shape": np.array([0, 2, len(filters) // 2, -1]),
        }
        model.graph.initializer.extend(
            numpy_helper.from_array(value, f"{name}_{key}") for key, value in values.items()
        )
        signal, convolved, parts = f"{name}_signal", f"{name}_convolved", f"{name}_parts"
        stride = [int(step)]  # type: ignore[arg-type]
        nodes += [
            helper.make_node("Reshape", [given[0], f"{name}_signal_shape"], [signal]),
            helper.make_node(
                "Conv", [signal, f"{name}_filters"], [convolved], strides=stride, name=node.name
            ),
            helper.make_node("Reshape", [convolved, f"{name}_parts_shape"], [parts]),
            helper.make_node("Transpose", [parts], [name], perm=[0, 3, 2, 1]),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _filters(window: np.ndarray, onesided: bool) -> np.ndarray:
    """Float32 ``(2 * bins, 1, samples)``: the real parts of all bins, then the imaginary ones."""
    count = len(window)
    bins = count // 2 + 1 if onesided else count
    angle = 2 * np.pi * (np.outer(np.arange(bins), np.arange(count)) % count) / count
    filters = np.concatenate([np.cos(angle), -np.sin(angle)]) * window
    return filters[:, None].astype(np.float32)
