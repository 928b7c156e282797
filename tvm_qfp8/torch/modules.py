"""Layers as in ``torch.nn``, of the same names and arguments, from compiled tables in both directions.

Each is a subclass of torch's layer, has no parameters of its own, and takes ``max_error`` as a keyword. ``inplace`` is
accepted and has no effect. See ``functional`` for tensors and errors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tvm_qfp8.torch import functional


class Interpolated(nn.Module):
    """What the layers share: the bound of their error."""

    max_error: float = functional.MAX_ERROR

    def __init__(self, *arguments: Any, max_error: float = functional.MAX_ERROR, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.max_error = max_error

    def extra_repr(self) -> str:
        """Torch's arguments and the bound."""
        return ", ".join(part for part in (super().extra_repr(), f"max_error={self.max_error:g}") if part)


class GELU(Interpolated, nn.GELU):
    """``torch.nn.GELU``, both forms."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.gelu(input, self.approximate, max_error=self.max_error)


class SiLU(Interpolated, nn.SiLU):
    """``torch.nn.SiLU``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.silu(input, max_error=self.max_error)


class Mish(Interpolated, nn.Mish):
    """``torch.nn.Mish``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.mish(input, max_error=self.max_error)


class Sigmoid(Interpolated, nn.Sigmoid):
    """``torch.nn.Sigmoid``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.sigmoid(input, max_error=self.max_error)


class Tanh(Interpolated, nn.Tanh):
    """``torch.nn.Tanh``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.tanh(input, max_error=self.max_error)


class Softplus(Interpolated, nn.Softplus):
    """``torch.nn.Softplus``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.softplus(input, self.beta, self.threshold, max_error=self.max_error)


class ELU(Interpolated, nn.ELU):
    """``torch.nn.ELU``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.elu(input, self.alpha, max_error=self.max_error)


class SELU(Interpolated, nn.SELU):
    """``torch.nn.SELU``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.selu(input, max_error=self.max_error)


class CELU(Interpolated, nn.CELU):
    """``torch.nn.CELU``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.celu(input, self.alpha, max_error=self.max_error)


class Hardswish(Interpolated, nn.Hardswish):
    """``torch.nn.Hardswish``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.hardswish(input, max_error=self.max_error)


class Hardsigmoid(Interpolated, nn.Hardsigmoid):
    """``torch.nn.Hardsigmoid``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.hardsigmoid(input, max_error=self.max_error)


class Softmax(Interpolated, nn.Softmax):
    """``torch.nn.Softmax``; ``dim=None`` means the last axis."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.softmax(input, -1 if self.dim is None else self.dim, max_error=self.max_error)


LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    layer.__mro__[2]: layer
    for layer in (
        GELU,
        SiLU,
        Mish,
        Sigmoid,
        Tanh,
        Softplus,
        ELU,
        SELU,
        CELU,
        Hardswish,
        Hardsigmoid,
        Softmax,
    )
}
"""By the layer of torch that each stands for."""
