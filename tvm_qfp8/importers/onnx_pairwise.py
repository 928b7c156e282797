"""ONNX operators of any number of inputs as one of two, for which there are kernels.

TVM's converters stack the inputs, which takes memory and time, and reduce the stack.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

from tvm import relax


class _Converter:
    """A converter of TVM's front end."""

    def __init__(self, operator: Callable, mean: bool = False) -> None:
        self.operator, self.mean = operator, mean

    def get_converter(self, _opset: int) -> Callable:
        return self._convert

    def _convert(self, builder: relax.BlockBuilder, inputs: list, _given: dict, _params: Any) -> relax.Expr:
        result = reduce(lambda x, y: builder.emit(self.operator(x, y)), inputs)
        if self.mean:
            result = builder.emit(relax.op.multiply(result, relax.const(1 / len(inputs), result.ty.dtype)))
        return result


CONVERTERS = {
    "Max": _Converter(relax.op.maximum),
    "Min": _Converter(relax.op.minimum),
    "Sum": _Converter(relax.op.add),
    "Mean": _Converter(relax.op.add, mean=True),
}
"""For TVM's front end, by operator."""
