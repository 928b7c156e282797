"""Writes ONNX nodes one after the other, in the form of the model's opset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


class Emitter:
    """Collects nodes; a call emits one operator and gives the name of its result.

    Attributes
    ----------
    nodes : list of NodeProto
        In the order of emission. Constants go to the model's initializers at once, equal ones once.
    """

    def __init__(self, model: onnx.ModelProto, prefix: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._model, self._prefix, self._count = model, prefix, 0
        self._constants: dict[tuple, str] = {}
        self.opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))

    def _name(self) -> str:
        self._count += 1
        return f"{self._prefix}/unrolled_{self._count}"

    def __call__(self, kind: str, *inputs: str, **given: Any) -> str:
        result = self._name()
        self.nodes.append(helper.make_node(kind, list(inputs), [result], name=result, **given))
        return result

    def constant(self, array: np.ndarray) -> str:
        """The name of an initializer with these values."""
        key = (array.shape, array.dtype.str, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._name()
            self._model.graph.initializer.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """``x`` in another shape."""
        return self("Reshape", x, self.constant(np.array(shape, np.int64)))

    def split(self, x: str, sizes: Sequence[int], axis: int) -> list[str]:
        """Parts of ``x`` along an axis."""
        if len(sizes) == 1:
            return [x]
        results = [self._name() for _ in sizes]
        if self.opset < 13:
            node = helper.make_node("Split", [x], results, name=results[0], axis=axis, split=list(sizes))
        else:
            lengths = self.constant(np.array(sizes, np.int64))
            node = helper.make_node("Split", [x, lengths], results, name=results[0], axis=axis)
        self.nodes.append(node)
        return results

    def clip(self, x: str, bound: float) -> str:
        """``x`` within +-``bound``; unchanged if the bound is 0."""
        if not bound:
            return x
        if self.opset < 11:
            return self("Clip", x, min=-bound, max=bound)
        low, high = (self.constant(np.array(v, np.float32)) for v in (-bound, bound))
        return self("Clip", x, low, high)

    def rename(self, x: str, name: str) -> None:
        """Give a value the name that the model has for it."""
        self.nodes.append(helper.make_node("Identity", [x], [name], name=name))
