"""Softmax with an interpolated exponential as a torch operator; its gradient is exact for the computed values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from tvm_qfp8.native_kernel import compile_native
from tvm_qfp8.tables.softmax import build_softmax_exp, softmax_exp_error
from tvm_qfp8.topi.softmax_rows import SoftmaxRows
from tvm_qfp8.torch.kernels import MIN_PARALLEL_ELEMENTS, check
from tvm_qfp8.torch.operators import refuse_second_derivative


def softmax_last(x: torch.Tensor, max_error: float) -> torch.Tensor:
    """Softmax over the last axis.

    Parameters
    ----------
    x
        float32 or bfloat16 on the CPU, ``(..., length)``.
    max_error
        Bound of each probability's error in float32 arithmetic.

    Raises
    ------
    InputError
        Another dtype or device.
    TableError
        An error below what float32 reaches.
    """
    if torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter):
        return _softmax(x, max_error)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _compute(x, max_error)
    return _Softmax.apply(x, max_error)


def _compute(x: torch.Tensor, max_error: float) -> torch.Tensor:
    check(x)
    x = x.detach()
    rows = x.float().contiguous()
    output = torch.empty_like(rows)
    if rows.numel():
        length = x.shape[-1] if x.dim() else 1
        parallel = rows.numel() >= MIN_PARALLEL_ELEMENTS and torch.get_num_threads() > 1
        # Lengths share a kernel up to the next power of two, whose table is good for all of them.
        kernel = _kernel(max_error, (length - 1).bit_length(), parallel)
        kernel(rows.view(-1), output.view(-1), length)
    return output.to(x.dtype)


@functools.cache
def _kernel(max_error: float, length_bits: int, parallel: bool) -> Callable:
    table = build_softmax_exp(softmax_exp_error(max_error, 1 << length_bits))
    return compile_native(SoftmaxRows(table, parallel).prim_func)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, max_error: float) -> torch.Tensor:
        output = _compute(x, max_error)
        _keep(ctx, (x, max_error), output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative()
        return _backward(ctx, grad)


@torch.library.custom_op("tvm_qfp8::softmax", mutates_args=())
def _softmax(x: torch.Tensor, max_error: float) -> torch.Tensor:
    return _compute(x, max_error)


@_softmax.register_fake
def _(x: torch.Tensor, max_error: float) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[torch.Tensor, float], output: torch.Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (output,) = ctx.saved_tensors
    return torch._softmax_backward_data(grad, output, -1, output.dtype), None


_softmax.register_autograd(_backward, setup_context=_keep)
