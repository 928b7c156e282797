"""Small ONNX models that tests make."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH, WORDS, PLACES = 24, 30, 20
"""Of ``encoder``."""


def model(nodes, inputs, outputs, constants, opset=17) -> onnx.ModelProto:
    """A checked model; ``inputs`` and ``outputs`` are {name: shape} of float32."""
    values = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in group.items()]
        for group in (inputs, outputs)
    ]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "test", *values, tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(made)
    return made


def cnn(opset=17, batch: int | str = 1) -> onnx.ModelProto:
    """Conv, BatchNorm, ReLU6, depthwise, residual, pooling, Gemm, softmax; input ``image`` (1, 3, 16, 16)."""
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    constants = {
        "w1": normal(16, 3, 3, 3, scale=0.3),
        "gamma": np.abs(normal(16)) + 0.5,
        "beta": normal(16),
        "mean": normal(16),
        "var": np.abs(normal(16)) + 0.5,
        "low": np.float32(0),
        "high": np.float32(6),
        "w2": normal(16, 1, 3, 3, scale=0.4),
        "b2": normal(16),
        "w3": normal(16, 16, 1, 1, scale=0.3),
        "w4": normal(10, 16, scale=0.3),
        "b4": normal(10),
    }
    node = helper.make_node
    nodes = [
        node("Conv", ["image", "w1"], ["c1"], pads=[1, 1, 1, 1], strides=[2, 2]),
        node("BatchNormalization", ["c1", "gamma", "beta", "mean", "var"], ["n1"]),
        node("Clip", ["n1", "low", "high"], ["r1"]),
        node("Conv", ["r1", "w2", "b2"], ["c2"], pads=[1, 1, 1, 1], group=16),
        node("Relu", ["c2"], ["r2"]),
        node("Conv", ["r2", "w3"], ["c3"]),
        node("Add", ["c3", "r1"], ["a3"]),
        node("GlobalAveragePool", ["a3"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "w4", "b4"], ["logits"], transB=1),
        node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    outputs = {"probabilities": (batch, 10)}
    return model(nodes, {"image": (batch, 3, 16, 16)}, outputs, constants, opset)


def encoder(masked: bool = True, words: int = WORDS) -> onnx.ModelProto:
    """Embeddings, a head of attention, a dense layer; inputs ``ids`` and ``mask``, int64 ``(n, m)``."""
    rng = np.random.default_rng(0)
    constants = {
        "words": rng.standard_normal((words, WIDTH)),
        "places": rng.standard_normal((1, PLACES, WIDTH)),
        **{name: rng.standard_normal((WIDTH, WIDTH)) / 4 for name in ("wq", "wk", "wv", "wo")},
    }
    node = helper.make_node
    masking = [
        node("Cast", ["mask"], ["m"], to=TensorProto.FLOAT),
        node("Sub", ["m", "unit"], ["m1"]),
        node("Mul", ["m1", "large"], ["m2"]),
        node("Unsqueeze", ["m2", "one"], ["bias"]),
        node("Add", ["scores", "bias"], ["masked"]),
    ]
    nodes = [
        node("Gather", ["words", "ids"], ["e"]),
        node("Shape", ["ids"], ["n"], start=1, end=2),
        node("Slice", ["places", "zero", "n", "one"], ["p"]),
        node("Add", ["e", "p"], ["x"]),
        node("MatMul", ["x", "wq"], ["q"]),
        node("MatMul", ["x", "wk"], ["k"]),
        node("MatMul", ["x", "wv"], ["v"]),
        node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["scores"]),
        *(masking if masked else []),
        node("Softmax", ["masked" if masked else "scores"], ["a"], axis=-1),
        node("MatMul", ["a", "v"], ["c"]),
        node("MatMul", ["c", "wo"], ["o"]),
        node("Add", ["o", "x"], ["tokens"]),
    ]
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()]
    tensors += [
        numpy_helper.from_array(np.array(value, dtype), name)
        for name, value, dtype in (
            ("zero", [0], np.int64),
            ("one", [1], np.int64),
            ("unit", 1, np.float32),
            ("large", 1e4, np.float32),
        )
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ("n", "m"))
        for name in (("ids", "mask") if masked else ("ids",))
    ]
    outputs = [helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ("n", "m", WIDTH))]
    graph = helper.make_graph(nodes, "encoder", inputs, outputs, tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made)
    return made


def tokens(length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of ``encoder``, none masked."""
    ids = np.random.default_rng(seed).integers(1, WORDS, (1, length))
    return {"ids": ids, "mask": np.ones((1, length), np.int64)}


def images(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Inputs for ``cnn``."""
    rng = np.random.default_rng(seed)
    return [{"image": rng.standard_normal((1, 3, 16, 16)).astype(np.float32)} for _ in range(count)]


def run_reference(made: onnx.ModelProto, inputs) -> list[np.ndarray]:
    """ONNX's own reference implementation."""
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(made).run(None, dict(inputs))


def heads(
    shape: tuple[int, int, int],
    queries: str = "MatMul (x, q)",
    keys: str = "MatMul (x, k)",
    values: str = "MatMul (x, v)",
    before: str = "",
    scale: float = 0.5,
) -> onnx.ModelProto:
    """Attention with two heads over ``x (batch, tokens, width)``, as exporters write it; ``one`` holds ones."""
    rng = np.random.default_rng(5)
    batch, tokens, width = shape
    body = f"""
        {before}
        queries = {queries}
        keys = {keys}
        values = {values}
        queries_by_head = Reshape (queries, split)
        keys_by_head = Reshape (keys, split)
        values_by_head = Reshape (values, split)
        q1 = Transpose <perm = [0, 2, 1, 3]> (queries_by_head)
        k1 = Transpose <perm = [0, 2, 3, 1]> (keys_by_head)
        v1 = Transpose <perm = [0, 2, 1, 3]> (values_by_head)
        scores = MatMul (q1, k1)
        shares = Softmax (scores)
        mixed = MatMul (shares, v1)
        together = Transpose <perm = [0, 2, 1, 3]> (mixed)
        y = Reshape (together, joined)
    """
    tensor = f"float[{batch}, {tokens}, {width}]"
    graph = onnx.parser.parse_graph(f"g ({tensor} x) => ({tensor} y) {{ {body} }}")
    constants = {name: rng.standard_normal((width, width), np.float32) * np.float32(scale) for name in "qkv"}
    constants |= {"split": np.array([batch, tokens, 2, width // 2]), "joined": np.array(shape)}
    constants["one"] = np.ones(width, np.float32)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
