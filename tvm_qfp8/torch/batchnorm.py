"""Re-estimates BatchNorm's statistics of a model whose tensors are quantized.

Rounding the weights and activations before a BatchNorm layer moves the mean and the variance of what it receives, and
statistics from float32 training no longer fit. After Nagel et al., A White Paper on Neural Network Quantization, 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tvm_qfp8.calibration.recalibration import HOLD_OUT_EVERY, LEAST_GAIN, Recalibration
from tvm_qfp8.errors import CalibrationError

MOST_HELD_OUT = 8


def recalibrate_batchnorm(
    model: nn.Module, batches: Iterable[Any], *, metric: Callable[[nn.Module], float] | None = None
) -> Recalibration:
    """Estimate the running statistics of every BatchNorm layer anew, in place, unless that makes the model worse.

    Parameters
    ----------
    model
        With its tensors quantized, in train or eval mode, which stays.
    batches
        Each a tensor, a tuple of positional arguments, or a dict of named ones; consumed once. Every fourth, and at
        most 8, are held out to compare the statistics on. Some thousand images in batches of 64 or more are enough.
    metric
        Scores the model, higher for better. Without one the score is how likely the held-out batches' channels are
        under the statistics, as normal distributions (mean logarithm over layers and channels), and has to rise by
        0.01, since statistics from few images are no better than others from few images.

    Returns
    -------
    Recalibration
        ``print`` it; ``kept_old`` says whether the old statistics stayed.

    Raises
    ------
    CalibrationError
        No batches, no BatchNorm layer with running statistics that the model calls, or values that are not finite.
    """
    layers = [
        module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    training = {module: module.training for module in model.modules()}
    held_out: list[Any] = []
    used = 0
    moments = {layer: _Moments() for layer in layers}
    model.eval()
    try:
        with torch.no_grad():
            with _batch_statistics(layers, moments):
                for index, batch in enumerate(batches):
                    if index % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1 and len(held_out) < MOST_HELD_OUT:
                        held_out.append(batch)
                    else:
                        call_model(model, batch)
                        used += 1
                    if not index:
                        first = batch
            seen = {layer: found for layer, found in moments.items() if found.count}
            if not used or not seen:
                raise CalibrationError(
                    f"recalibrate_batchnorm saw {used} batches and {len(seen)} BatchNorm layers with running "
                    "statistics; it needs at least one of each"
                )
            score = metric or (lambda scored: _likelihood(scored, list(seen), held_out or [first]))
            before = float(score(model))
            old = {layer: (layer.running_mean.clone(), layer.running_var.clone()) for layer in seen}
            for layer, found in seen.items():
                _set(layer, *found.mean_and_variance())
            after = float(score(model))
            kept_old = not after > before + (0.0 if metric else LEAST_GAIN)
            for layer, (mean, variance) in old.items() if kept_old else ():
                _set(layer, mean, variance)
    finally:
        for module, mode in training.items():
            module.training = mode
    return Recalibration(0 if kept_old else len(seen), len(seen), used, before, after)


class _Moments:
    """Sums over all batches of a layer's input, per channel, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Any = 0.0
        self._squares: Any = 0.0

    def add(self, x: torch.Tensor) -> None:
        values = x.detach().transpose(0, 1).flatten(1).double()
        self.count += values.shape[1]
        self._sum = self._sum + values.sum(1)
        self._squares = self._squares + values.square().sum(1)

    def mean_and_variance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The variance is the unbiased one, which torch keeps."""
        mean = self._sum / self.count
        variance = (self._squares / self.count - mean.square()).clamp(min=0.0)
        if not bool(torch.isfinite(mean).all() and torch.isfinite(variance).all()):
            raise CalibrationError("a BatchNorm layer received NaN or infinity; give finite batches")
        return mean, variance * (self.count / max(self.count - 1, 1))


@contextmanager
def _batch_statistics(layers: list[_BatchNorm], moments: dict[_BatchNorm, _Moments]) -> Iterator[None]:
    """Record what the layers receive, each normalizing by its batch, with running statistics untouched."""

    def record(layer: _BatchNorm, arguments: tuple[torch.Tensor, ...]) -> None:
        moments[layer].add(arguments[0])

    def normalize(
        layer: _BatchNorm, arguments: tuple[torch.Tensor, ...], _output: torch.Tensor
    ) -> torch.Tensor:
        (x,) = arguments
        return nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)

    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    hooks += [layer.register_forward_hook(normalize) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _likelihood(model: nn.Module, layers: list[_BatchNorm], batches: list[Any]) -> float:
    """Mean over layers and channels of the log-likelihood of what the layers receive, up to a constant."""
    values = []

    def score(layer: _BatchNorm, arguments: tuple[torch.Tensor, ...]) -> None:
        x = arguments[0].detach().transpose(0, 1).flatten(1).double()
        variance = layer.running_var.double() + layer.eps
        distance = (x - layer.running_mean.double()[:, None]).square().mean(1)
        values.append(float(-0.5 * (variance.log() + distance / variance).mean()))

    hooks = [layer.register_forward_pre_hook(score) for layer in layers]
    try:
        for batch in batches:
            call_model(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return math.fsum(values) / len(values)


def _set(layer: _BatchNorm, mean: torch.Tensor, variance: torch.Tensor) -> None:
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance)


def call_model(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)
