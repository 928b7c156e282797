"""A Llama decoder as an ONNX graph, written as torch.onnx exports it: RMSNorm, rotary positions, grouped heads, SiLU.

One static window without a cache: token ids in, logits of every position out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from zoo.onnx_graph import Graph

OPSET = 17


@dataclass(frozen=True)
class Sizes:
    """What the file's metadata say of the network."""

    layers: int
    heads: int
    groups: int
    """Heads of keys and values."""
    hidden: int
    rotary_base: float
    epsilon: float

    @property
    def head(self) -> int:
        return self.hidden // self.heads


class _Decoder(Graph):
    def __init__(self, weights: Mapping[str, np.ndarray], sizes: Sizes, length: int) -> None:
        super().__init__(weights)
        self.sizes, self.length = sizes, length
        frequency = sizes.rotary_base ** -(np.arange(0, sizes.head, 2) / sizes.head)
        angle = np.tile(np.arange(length)[:, None] * frequency, 2)
        self.cosine = self.constant("cosine", np.cos(angle).astype(np.float32)[None, None])
        self.sine = self.constant("sine", np.sin(angle).astype(np.float32)[None, None])
        hidden = np.triu(np.full((length, length), np.finfo(np.float32).min, np.float32), 1)
        self.mask = self.constant("mask", hidden[None, None])

    def linear(self, x: str, name: str) -> str:
        return self.op("MatMul", x, self.constant(f"{name}.kernel", self.weights[f"{name}.weight"].T))

    def rms_norm(self, x: str, name: str) -> str:
        mean = self.op("ReduceMean", self.op("Pow", x, self.number(2.0)), axes=[-1])
        root = self.op("Sqrt", self.op("Add", mean, self.number(self.sizes.epsilon)))
        scaled = self.op("Mul", x, self.op("Div", self.number(1.0), root))
        return self.op("Mul", self.weight(f"{name}.weight"), scaled)

    def heads(self, x: str, count: int) -> str:
        shape = self.integers(1, self.length, count, self.sizes.head)
        return self.op("Transpose", self.op("Reshape", x, shape), perm=[0, 2, 1, 3])

    def rotated(self, x: str) -> str:
        half, whole = self.integers(self.sizes.head // 2), self.integers(self.sizes.head)
        first = self.op("Slice", x, self.integers(0), half, self.integers(3))
        second = self.op("Slice", x, half, whole, self.integers(3))
        turned = self.op("Concat", self.op("Neg", second), first, axis=-1)
        return self.op("Add", self.op("Mul", x, self.cosine), self.op("Mul", turned, self.sine))

    def repeated(self, x: str) -> str:
        """Keys or values for every head of the queries."""
        s, each = self.sizes, self.sizes.heads // self.sizes.groups
        spread = self.op("Unsqueeze", x, self.integers(2))
        spread = self.op("Expand", spread, self.integers(1, s.groups, each, self.length, s.head))
        return self.op("Reshape", spread, self.integers(1, s.heads, self.length, s.head))

    def attention(self, x: str, name: str) -> str:
        s = self.sizes
        query = self.rotated(self.heads(self.linear(x, f"{name}.attn_q"), s.heads))
        key = self.repeated(self.rotated(self.heads(self.linear(x, f"{name}.attn_k"), s.groups)))
        value = self.repeated(self.heads(self.linear(x, f"{name}.attn_v"), s.groups))
        scores = self.op("MatMul", query, self.op("Transpose", key, perm=[0, 1, 3, 2]))
        scores = self.op("Add", self.op("Div", scores, self.number(math.sqrt(s.head))), self.mask)
        context = self.op("MatMul", self.op("Softmax", scores, axis=-1), value)
        merged = self.op("Transpose", context, perm=[0, 2, 1, 3])
        merged = self.op("Reshape", merged, self.integers(1, self.length, s.hidden))
        return self.linear(merged, f"{name}.attn_output")

    def feed_forward(self, x: str, name: str) -> str:
        gate = self.linear(x, f"{name}.ffn_gate")
        gated = self.op("Mul", gate, self.op("Sigmoid", gate))
        return self.linear(self.op("Mul", gated, self.linear(x, f"{name}.ffn_up")), f"{name}.ffn_down")

    def layer(self, x: str, name: str) -> str:
        x = self.op("Add", x, self.attention(self.rms_norm(x, f"{name}.attn_norm"), name))
        return self.op("Add", x, self.feed_forward(self.rms_norm(x, f"{name}.ffn_norm"), name))


def decoder(weights: Mapping[str, np.ndarray], sizes: Sizes, length: int) -> onnx.ModelProto:
    """ONNX model with input ``input_ids (1, length)`` int64 and output ``logits (1, length, vocabulary)``.

    Parameters
    ----------
    weights : mapping of float32 arrays
        By their GGUF names, ``(out, in)`` each; queries and keys in the order of halves (see ``smollm2``). The
        embedding table is also the output layer.
    """
    graph = _Decoder(weights, sizes, length)
    x = graph.op("Gather", graph.weight("token_embd.weight"), "input_ids")
    for i in range(sizes.layers):
        x = graph.layer(x, f"blk.{i}")
    graph.linear(graph.rms_norm(x, "output_norm"), "token_embd")
    graph.nodes[-1].output[0] = "logits"
    vocabulary = len(weights["token_embd.weight"])
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, length])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, length, vocabulary])
    model = helper.make_model(
        helper.make_graph(graph.nodes, "llama", [ids], [logits], list(graph.constants.values())),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=8,
    )
    onnx.checker.check_model(model)
    return model
