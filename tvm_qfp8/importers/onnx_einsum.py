"""Einsum as an operator of Relax, which the passes know, instead of loops that nothing recognises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax


class _Converter:
    """A converter of TVM's front end."""

    def get_converter(self, _opset: int) -> Callable:
        return self._convert

    def _convert(self, builder: relax.BlockBuilder, inputs: list, given: dict, _params: Any) -> relax.Expr:
        return builder.emit(relax.op.einsum(list(inputs), given["equation"].decode()))


CONVERTERS = {"Einsum": _Converter()}
"""For TVM's front end, by operator."""
