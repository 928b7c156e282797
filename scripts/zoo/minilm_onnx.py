"""BERT encoder as an ONNX graph, from a safetensors state dict, node for node as torch.onnx exports it.

LayerNorm and GELU are decomposed, the mask is ``(1 - mask) * -10000``, added; batch and sequence are dynamic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from zoo.onnx_graph import Graph

OPSET = 14
EPSILON = 1e-12
MASKED = -10000.0


class _Graph(Graph):
    def linear(self, x: str, name: str) -> str:
        kernel = self.constant(f"{name}.kernel", self.weights[f"{name}.weight"].T)
        return self.op("Add", self.weight(f"{name}.bias"), self.op("MatMul", x, kernel))

    def layer_norm(self, x: str, name: str) -> str:
        centred = self.op("Sub", x, self.op("ReduceMean", x, axes=[-1]))
        variance = self.op("ReduceMean", self.op("Pow", centred, self.number(2.0)), axes=[-1])
        deviation = self.op("Sqrt", self.op("Add", variance, self.number(EPSILON)))
        scaled = self.op("Mul", self.op("Div", centred, deviation), self.weight(f"{name}.weight"))
        return self.op("Add", scaled, self.weight(f"{name}.bias"))

    def gelu(self, x: str) -> str:
        erf = self.op("Erf", self.op("Div", x, self.number(math.sqrt(2.0))))
        return self.op("Mul", self.op("Mul", x, self.op("Add", erf, self.number(1.0))), self.number(0.5))

    def embeddings(self, ids: str, types: str) -> str:
        length = self.op("Gather", self.op("Shape", ids), self.constant("one", np.array(1, np.int64)), axis=0)
        end = self.op("Unsqueeze", length, self.integers(0))
        positions = self.op(
            "Slice",
            self.weight("embeddings.position_ids"),
            self.integers(0),
            end,
            self.integers(1),
            self.integers(1),
        )
        tables = [
            self.weight(f"embeddings.{kind}_embeddings.weight") for kind in ("word", "token_type", "position")
        ]
        word, kind, position = (
            self.op("Gather", table, index)
            for table, index in zip(tables, (ids, types, positions), strict=True)
        )
        return self.layer_norm(self.op("Add", self.op("Add", word, kind), position), "embeddings.LayerNorm")

    def additive_mask(self, mask: str) -> str:
        spread = self.op("Unsqueeze", self.op("Unsqueeze", mask, self.integers(1)), self.integers(2))
        hidden = self.op("Sub", self.number(1.0), self.op("Cast", spread, to=TensorProto.FLOAT))
        return self.op("Mul", hidden, self.number(MASKED))

    def attention(self, x: str, mask: str, name: str, heads: int, head_size: int) -> str:
        def split(part: str, perm: list[int]) -> str:
            projected = self.linear(x, f"{name}.self.{part}")
            return self.op(
                "Transpose", self.op("Reshape", projected, self.integers(0, 0, heads, head_size)), perm=perm
            )

        query, key = split("query", [0, 2, 1, 3]), split("key", [0, 2, 3, 1])
        value = split("value", [0, 2, 1, 3])
        scores = self.op("Div", self.op("MatMul", query, key), self.number(math.sqrt(head_size)))
        weights = self.op("Softmax", self.op("Add", scores, mask), axis=-1)
        context = self.op("Transpose", self.op("MatMul", weights, value), perm=[0, 2, 1, 3])
        merged = self.op("Reshape", context, self.integers(0, 0, heads * head_size))
        return self.linear(merged, f"{name}.output.dense")

    def layer(self, x: str, mask: str, name: str, heads: int, head_size: int) -> str:
        attended = self.op("Add", self.attention(x, mask, f"{name}.attention", heads, head_size), x)
        x = self.layer_norm(attended, f"{name}.attention.output.LayerNorm")
        wide = self.gelu(self.linear(x, f"{name}.intermediate.dense"))
        return self.layer_norm(
            self.op("Add", self.linear(wide, f"{name}.output.dense"), x), f"{name}.output.LayerNorm"
        )


def encoder(weights: Mapping[str, np.ndarray], layers: int, heads: int) -> onnx.ModelProto:
    """ONNX model with inputs input_ids, attention_mask, token_type_ids, all ``(batch, sequence)`` int64.

    Parameters
    ----------
    weights : mapping of float32 arrays
        State dict of a Hugging Face `BertModel`; its pooler is not used.
    layers, heads : int
        `num_hidden_layers` and `num_attention_heads` of its config.

    Returns
    -------
    onnx.ModelProto
        Opset 14; one output ``last_hidden_state (batch, sequence, hidden)`` float32.
    """
    hidden = weights["embeddings.LayerNorm.weight"].size
    names = ["input_ids", "attention_mask", "token_type_ids"]
    graph = _Graph(weights)
    x, mask = graph.embeddings(names[0], names[2]), graph.additive_mask(names[1])
    for i in range(layers):
        x = graph.layer(x, mask, f"encoder.layer.{i}", heads, hidden // heads)
    graph.nodes[-1].output[0] = "last_hidden_state"
    dynamic = ["batch", "sequence"]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "bert",
            [helper.make_tensor_value_info(name, TensorProto.INT64, dynamic) for name in names],
            [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [*dynamic, hidden])],
            list(graph.constants.values()),
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=8,
    )
    onnx.checker.check_model(model)
    return model
