"""Compiled kernels on torch tensors, which TVM takes by DLPack without a copy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from tvm_qfp8.errors import InputError
from tvm_qfp8.native_kernel import compile_native
from tvm_qfp8.tables import build_table
from tvm_qfp8.topi.apply_table import ApplyTable

MIN_PARALLEL_ELEMENTS = 65_536
_STORAGE = {torch.float32: "float32", torch.bfloat16: "uint16"}


def apply_table(function: str, max_error: float, x: torch.Tensor) -> torch.Tensor:
    """The table of ``function`` on every element of ``x``; a new tensor of its shape and dtype."""
    return _run(function, max_error, [x])


def apply_gradient(function: str, max_error: float, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``grad`` times the derivative of ``function`` at ``x``; a new tensor of the shape and dtype of ``x``."""
    return _run(function + "'", max_error, [grad, x])


def check(x: torch.Tensor) -> None:
    """Refuse what no kernel takes.

    Raises
    ------
    InputError
        A dtype other than float32 and bfloat16, or a device other than the CPU.
    """
    if x.dtype not in _STORAGE or x.device.type != "cpu":
        raise InputError(
            f"an interpolated layer got {str(x.dtype).removeprefix('torch.')} on {x.device}; it takes float32 "
            "and bfloat16 on the CPU: convert the tensor or keep torch's own layer there"
        )


def _run(function: str, max_error: float, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    x = inputs[-1]
    check(x)
    # Any order of the elements will do, as long as there are no gaps and it is the same for all.
    output = torch.empty_like(x)
    arrays = [_flat(_ordered_as(output, tensor)) for tensor in inputs]
    parallel = x.numel() >= MIN_PARALLEL_ELEMENTS and torch.get_num_threads() > 1
    _kernel(function, max_error, len(inputs) == 2, _STORAGE[x.dtype], parallel)(*arrays, _flat(output))
    return output


def _ordered_as(output: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.stride() == output.stride() and tensor.dtype == output.dtype:
        return tensor.detach()
    return torch.empty_like(output).copy_(tensor)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat if flat.dtype == torch.float32 else flat.view(torch.uint16)


@functools.cache
def _kernel(function: str, max_error: float, gradient: bool, storage: str, parallel: bool) -> Callable:
    table = build_table(function, max_error)
    return compile_native(ApplyTable(table, gradient, storage, parallel).prim_func)
