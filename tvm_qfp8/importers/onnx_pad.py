"""ONNX's padding by a tensor's own elements as ``relax.nn.pad``: TVM's converter writes kernels, unknown to passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper
from tvm import relax
from tvm.ir import GenericConst

MODES = {b"reflect": "reflect", b"edge": "replicate", b"wrap": "circular"}


class _Converter:
    """A converter of TVM's front end, which does what is left."""

    def get_converter(self, opset: int) -> Callable:
        from tvm.relax.frontend.onnx.onnx_frontend import Pad, get_constant

        others = Pad.get_converter(opset)

        def convert(builder: relax.BlockBuilder, inputs: list, given: dict, params: Any) -> relax.Expr:
            x, pads, _, axes = [*inputs, None, None, None][:4]
            mode, rank = MODES.get(given.get("mode", b"")), len(x.ty.shape)
            known = given.get("pads") if pads is None else _numbers(get_constant(pads, params))
            over = range(rank) if axes is None else _numbers(get_constant(axes, params))
            if mode is None or known is None or over is None or min(known, default=0) < 0:
                return others(builder, inputs, given, params)
            return relax.op.nn.pad(x, _widths(rank, known, over).reshape(-1).tolist(), pad_mode=mode)

        return convert


def _widths(rank: int, pads: Sequence[int], axes: Sequence[int]) -> np.ndarray:
    """Before and after each axis, ``(rank, 2)``."""
    widths = np.zeros((rank, 2), int)
    widths[list(axes)] = np.reshape(pads, (2, -1)).T
    return widths


def _numbers(constant: Any) -> list[int] | None:
    return constant.value.numpy().tolist() if isinstance(constant, GenericConst) else None


CONVERTERS = {"Pad": _Converter()}
"""For TVM's front end, by operator."""


def check_reflection(
    node: NodeProto, shapes: Mapping[str, list[int]], constants: Mapping[str, TensorProto]
) -> str | None:
    """Why a reflection cannot be computed: it may not reach behind the other edge."""
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    _, pads, _, axes = [constants.get(name) for name in (*node.input, "", "", "")][:4]
    shape = shapes.get(node.input[0], [])
    known = given.get("pads") if pads is None else numpy_helper.to_array(pads)
    over = range(len(shape)) if axes is None else numpy_helper.to_array(axes)
    if given.get("mode") != b"reflect" or known is None or not shape or not all(shape):
        return None
    widths = _widths(len(shape), known, over)
    reaches = (widths >= np.array(shape)[:, None]).any()
    return f"reflections of {widths.tolist()} places on a shape of {shape}" if reaches else None
