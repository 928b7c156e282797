"""What a model of the zoo offers, and how two runners of it are compared: task scores, paired bootstrap, SQNR."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

Run = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]
"""One call of a model with its static shapes: inputs by name, outputs in the model's order."""

BOOTSTRAP_SEED = 20261122
RESAMPLES = 10_000


@dataclass(frozen=True)
class Task:
    """One scored data set.

    Attributes
    ----------
    name, metric : str
    items : int
        Number of things that are drawn with replacement in the bootstrap.
    outcomes : callable ``(run) -> array``
        What `value` needs to know of every item; first axis ``(items,)``.
    value : callable ``(outcomes, index) -> float``
        Score of the items of `index` ``(k,)`` int, repeats allowed. Higher is better.
    """

    name: str
    metric: str
    items: int
    outcomes: Callable[[Run], np.ndarray]
    value: Callable[[np.ndarray, np.ndarray], float]

    def score(self, outcomes: np.ndarray) -> float:
        """Score of all items."""
        return self.value(outcomes, np.arange(self.items))


class Model(Protocol):
    """The functions that each model's module of this package has."""

    NAME: str

    def onnx_path(self) -> Path:
        """Path of the raw float32 ONNX file in the cache, made when missing."""

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Static shape of every input."""

    def calibration(self, n: int) -> list[dict[str, np.ndarray]]:
        """`n` samples with the shapes of `input_shapes`; none of them is scored."""

    def tasks(self, quick: bool = False) -> list[Task]:
        """The scored data sets; `quick` takes a small part of each."""

    def probes(self, quick: bool = False) -> list[dict[str, np.ndarray]]:
        """Inputs on which the outputs themselves are compared (`compare_outputs`)."""


def mean_of(outcomes: np.ndarray, index: np.ndarray) -> float:
    """Mean of hits: the `value` of an accuracy."""
    return float(outcomes[index].mean())


def paired_bootstrap(task: Task, reference: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Loss of `other` against `reference` on the same items, with a 95 % interval (percentile bootstrap).

    Returns
    -------
    dict
        ``loss`` (reference - other), ``low`` and ``high``, and the same divided by the reference's score as
        ``relative_loss``, ``relative_low``, ``relative_high``.
    """
    rng = np.random.RandomState(BOOTSTRAP_SEED)
    losses = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        index = rng.randint(task.items, size=task.items)
        losses[i] = task.value(reference, index) - task.value(other, index)
    base = task.score(reference)
    loss = base - task.score(other)
    low, high = np.percentile(losses, [2.5, 97.5])
    found = {"loss": loss, "low": float(low), "high": float(high)}
    return found | {f"relative_{key}": value / base for key, value in found.items()}


def sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    """``10 log10(sum reference^2 / sum (reference - other)^2)`` in dB; infinite when equal."""
    reference = np.asarray(reference, np.float64)
    noise = ((reference - other) ** 2).sum()
    return float(10 * np.log10((reference**2).sum() / noise)) if noise else float("inf")


def compare_outputs(run: Run, reference: Run, inputs: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """First outputs of two runners on the same inputs.

    Returns
    -------
    dict
        ``sqnr_db`` over all values, and ``agreement``: how often the largest of the last axis is at the same place.
    """
    expected = np.concatenate([reference(one)[0] for one in inputs])
    found = np.concatenate([run(one)[0] for one in inputs])
    same = expected.argmax(-1) == found.argmax(-1)
    return {"sqnr_db": sqnr_db(expected, found), "agreement": float(same.mean())}
