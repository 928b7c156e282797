"""ONNX's padding by a tensor's own elements as ``relax.nn.pad``: TVM's converter writes kernels, unknown to passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper
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
            widths = np.zeros((rank, 2), int)
            widths[[int(axis) for axis in over]] = np.reshape(known, (2, -1)).T
            return relax.op.nn.pad(x, widths.reshape(-1).tolist(), pad_mode=mode)

        return convert


def _numbers(constant: Any) -> list[int] | None:
    return constant.value.numpy().tolist() if isinstance(constant, GenericConst) else None


CONVERTERS = {"Pad": _Converter()}
"""For TVM's front end, by operator."""


def check_reflection(
    node: NodeProto, shapes: dict[str, list[int]], constants: dict[str, TensorProto], mode: bytes
) -> str | None:
    """Why a reflection cannot be computed: it may not reach behind the other edge."""
    pads = constants.get(node.input[1]) if len(node.input) > 1 else None
    shape = shapes.get(node.input[0], [])
    if mode != b"reflect" or pads is None or len(node.input) > 3 or not all(shape):
        return None
    widths = numpy_helper.to_array(pads).reshape(2, -1)
    reaches = len(shape) == widths.shape[1] and (widths >= np.array(shape)).any()
    return f"reflections of {widths.tolist()} places on a shape of {shape}" if reaches else None
