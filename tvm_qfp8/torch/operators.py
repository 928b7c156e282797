"""The interpolated functions as torch operators with gradients.

Eager calls go through ``torch.autograd.Function``, which costs a third of a custom operator's overhead; tracers
(``torch.compile``, fake tensors) see the custom operator ``tvm_qfp8::interpolate``.
"""

from __future__ import annotations

from typing import Any

import torch

from tvm_qfp8.errors import InputError
from tvm_qfp8.torch.kernels import apply_gradient, apply_table


def interpolate(x: torch.Tensor, function: str, max_error: float) -> torch.Tensor:
    """``function``, a name of ``tables.FUNCTIONS`` that has a derivative, on every element of ``x``.

    Parameters
    ----------
    x
        float32 or bfloat16 on the CPU, any shape and strides.
    function
        Such as ``gelu`` or ``elu(0.5)``.
    max_error
        Bound of the value's error, of ``max(1, |f(x)|)``, and of the derivative's. Of float32 arithmetic; bfloat16
        results are rounded once more.

    Raises
    ------
    InputError
        Another dtype or device.
    TableError
        An unknown function, or an error below what a table reaches.
    """
    if torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter):
        return _interpolate(x, function, max_error)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return apply_table(function, max_error, x)
    return _Interpolate.apply(x, function, max_error)


def refuse_second_derivative() -> None:
    """Raise ``InputError`` in a backward pass that shall itself be differentiated.

    Torch would take the kernel's result for a constant, and so give wrong second derivatives without a word.
    """
    if torch.is_grad_enabled():
        raise InputError(
            "interpolated layers have first derivatives only; call backward without create_graph=True, or keep "
            "torch's own layers there"
        )


class _Interpolate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, function: str, max_error: float) -> torch.Tensor:
        _keep(ctx, (x, function, max_error), None)
        return apply_table(function, max_error, x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative()
        (x,) = ctx.saved_tensors
        return apply_gradient(ctx.function, ctx.max_error, grad, x), None, None


@torch.library.custom_op("tvm_qfp8::interpolate", mutates_args=())
def _interpolate(x: torch.Tensor, function: str, max_error: float) -> torch.Tensor:
    return apply_table(function, max_error, x)


@torch.library.custom_op("tvm_qfp8::interpolate_backward", mutates_args=())
def _interpolate_backward(
    grad: torch.Tensor, x: torch.Tensor, function: str, max_error: float
) -> torch.Tensor:
    return apply_gradient(function, max_error, grad, x)


@_interpolate.register_fake
def _(x: torch.Tensor, function: str, max_error: float) -> torch.Tensor:
    return torch.empty_like(x)


@_interpolate_backward.register_fake
def _(grad: torch.Tensor, x: torch.Tensor, function: str, max_error: float) -> torch.Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[torch.Tensor, str, float], output: Any) -> None:
    x, ctx.function, ctx.max_error = inputs
    ctx.save_for_backward(x)


def _traced_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return _interpolate_backward(grad, x, ctx.function, ctx.max_error), None, None


_interpolate.register_autograd(_traced_backward, setup_context=_keep)
