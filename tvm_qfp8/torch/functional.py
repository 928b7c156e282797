"""Functions as in ``torch.nn.functional``, from compiled tables in both directions.

Each takes torch's arguments, without ``inplace``, and ``max_error``: the bound of ``|y - f(x)| / max(1, |f(x)|)``, of
the derivative's error likewise, and for softmax of each probability's error. Tensors are float32 or bfloat16, of any
shape and strides; else ``InputError``. On a device other than the CPU torch's own function runs. While ``torch.export``
traces, torch's own function stands in the program, for ``tvm_qfp8.compile`` to interpolate.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as exact

from tvm_qfp8.errors import InputError
from tvm_qfp8.torch.operators import interpolate
from tvm_qfp8.torch.softmax import softmax_last

MAX_ERROR = 1e-3


def _is_exact(input: torch.Tensor) -> bool:
    """Whether torch's own function is called."""
    return torch.compiler.is_exporting() or input.device.type != "cpu"


def gelu(input: torch.Tensor, approximate: str = "none", *, max_error: float = MAX_ERROR) -> torch.Tensor:
    """``input * Phi(input)``, or its tanh form with ``approximate="tanh"``."""
    if approximate not in ("none", "tanh"):
        raise InputError(f"approximate is {approximate!r}; 'none' and 'tanh' are the forms of gelu")
    if _is_exact(input):
        return exact.gelu(input, approximate=approximate)
    return interpolate(input, "gelu" if approximate == "none" else "gelu_tanh", max_error)


def silu(input: torch.Tensor, *, max_error: float = MAX_ERROR) -> torch.Tensor:
    """``input * sigmoid(input)``."""
    return exact.silu(input) if _is_exact(input) else interpolate(input, "silu", max_error)


def mish(input: torch.Tensor, *, max_error: float = MAX_ERROR) -> torch.Tensor:
    """``input * tanh(softplus(input))``."""
    return exact.mish(input) if _is_exact(input) else interpolate(input, "mish", max_error)


def sigmoid(input: torch.Tensor, *, max_error: float = MAX_ERROR) -> torch.Tensor:
    """``1 / (1 + exp(-input))``."""
    return torch.sigmoid(input) if _is_exact(input) else interpolate(input, "sigmoid", max_error)


def tanh(input: torch.Tensor, *, max_error: float = MAX_ERROR) -> torch.Tensor:
    """The hyperbolic tangent."""
    return torch.tanh(input) if _is_exact(input) else interpolate(input, "tanh", max_error)


def softplus(
    input: torch.Tensor, beta: float = 1.0, threshold: float = 20.0, *, max_error: float = MAX_ERROR
) -> torch.Tensor:
    """``log(1 + exp(beta * input)) / beta``; ``threshold`` has to be where that is ``input`` within ``max_error``."""
    if _is_exact(input):
        return exact.softplus(input, beta, threshold)
    if not (beta > 0 and threshold > 0 and math.log1p(math.exp(-threshold)) <= max_error * beta):
        raise InputError(
            f"softplus with beta={beta:g} and threshold={threshold:g} jumps by more than max_error={max_error:g} at "
            "the threshold; tables are for a positive beta and a larger threshold"
        )
    if beta == 1:
        return interpolate(input, "softplus", max_error)
    return interpolate(input * beta, "softplus", max_error * min(beta, 1.0)) / beta


def elu(input: torch.Tensor, alpha: float = 1.0, *, max_error: float = MAX_ERROR) -> torch.Tensor:
    """``input`` above 0, ``alpha * (exp(input) - 1)`` below; alpha from 0.001 to 1000."""
    if _is_exact(input):
        return exact.elu(input, alpha)
    return interpolate(input, "elu" if alpha == 1 else f"elu({float(alpha)!r})", max_error)


def selu(input: torch.Tensor, *, max_error: float = MAX_ERROR) -> torch.Tensor:
    """The scaled ELU of self-normalizing networks (Klambauer et al., 2017)."""
    return exact.selu(input) if _is_exact(input) else interpolate(input, "selu", max_error)


def celu(input: torch.Tensor, alpha: float = 1.0, *, max_error: float = MAX_ERROR) -> torch.Tensor:
    """``input`` above 0, ``alpha * (exp(input / alpha) - 1)`` below; alpha from 0.001 to 1000."""
    if _is_exact(input):
        return exact.celu(input, alpha)
    return interpolate(input, "celu" if alpha == 1 else f"celu({float(alpha)!r})", max_error)


def hardswish(input: torch.Tensor, *, max_error: float = MAX_ERROR) -> torch.Tensor:
    """``input * hardsigmoid(input)``; plain arithmetic, exact to float32 rounding."""
    return exact.hardswish(input) if _is_exact(input) else interpolate(input, "hardswish", max_error)


def hardsigmoid(input: torch.Tensor, *, max_error: float = MAX_ERROR) -> torch.Tensor:
    """``input / 6 + 1/2`` between 0 and 1; plain arithmetic, exact to float32 rounding."""
    if _is_exact(input):
        return exact.hardsigmoid(input)
    return interpolate(input, "hardsigmoid", max_error)


def softmax(
    input: torch.Tensor,
    dim: int = -1,
    dtype: torch.dtype | None = None,
    *,
    max_error: float = MAX_ERROR,
) -> torch.Tensor:
    """``exp(input)`` over its sum along ``dim``; the gradient is exact for the computed values."""
    if _is_exact(input):
        return torch.softmax(input, dim, dtype)
    if dtype is not None:
        input = input.to(dtype)
    if input.dim() == 0 or dim in (-1, input.dim() - 1):
        return softmax_last(input, max_error)
    return softmax_last(input.movedim(dim, -1), max_error).movedim(-1, dim)
