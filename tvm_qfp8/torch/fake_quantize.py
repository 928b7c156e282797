"""Rounding to an 8-bit layout in a torch graph, with straight-through gradients.

The values are those of ``format.decode(format.encode(x))`` to the bit, on any device. The gradient of ``x`` passes
where the layout reaches and is 0 beyond. That of the scale is rounded minus exact value, in steps, and the largest
grid value beyond (Esser et al., Learned Step Size Quantization, 2020).
"""

from __future__ import annotations

from typing import Any

import torch

from tvm_qfp8.format import Layout, get_layout

PER_TENSOR = -1
"""In place of an axis: one scale for all."""
_EXPONENT = 0x7F800000


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, layout: str, axis: int = PER_TENSOR) -> torch.Tensor:
    """``x`` rounded to the values ``G * scale`` of a layout.

    Parameters
    ----------
    x
        Any float dtype, which the result has; the arithmetic is float32.
    scale
        float32, positive: ``()``, or one for each index of ``axis``.
    layout
        A name of ``format.LAYOUTS``.
    axis
        Not negative, or ``PER_TENSOR``.
    """
    if torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter):
        return _fake_quantize(x, scale, layout, axis)
    return _FakeQuantize.apply(x, scale, layout, axis)


def grid_values(x: torch.Tensor, scale: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The grid values G that float32 ``x`` is rounded to, as float32; ``scale`` broadcasts against ``x``."""
    value = x * torch.reciprocal(scale)
    value.clamp_(-float(layout.max_grid) if layout.signed else 0.0, float(layout.max_grid))
    # 1.5 * 2^23 steps of the value's binade leave no bits below a step: to nearest, ties to even.
    binade = torch.bitwise_and(value.view(torch.int32), _EXPONENT).view(torch.float32)
    magic = binade.clamp_(min=2.0**layout.mantissa_bits).mul_(1.5 * 2.0 ** (23 - layout.mantissa_bits))
    return value.add_(magic).sub_(magic)


def spread(scale: torch.Tensor, axis: int, rank: int) -> torch.Tensor:
    """``scale`` in a shape that broadcasts against a tensor of ``rank``."""
    if axis == PER_TENSOR:
        return scale
    return scale.reshape([-1 if i == axis else 1 for i in range(rank)])


def _round(x: torch.Tensor, scale: torch.Tensor, layout: str, axis: int) -> torch.Tensor:
    wide = spread(scale, axis, x.dim())
    return grid_values(x.float(), wide, get_layout(layout)).mul_(wide).to(x.dtype)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, scale = ctx.saved_tensors
    layout = get_layout(ctx.layout)
    wide = spread(scale, ctx.axis, x.dim())
    value = x.float() * torch.reciprocal(wide)
    low, high = -float(layout.max_grid) if layout.signed else 0.0, float(layout.max_grid)
    inside = (value >= low) & (value <= high)
    of_scale = None
    if ctx.needs_input_grad[1]:
        grid = grid_values(x.float(), wide, layout)
        each = grad.float() * torch.where(inside, grid - value, grid)
        of_scale = each.sum() if ctx.axis == PER_TENSOR else each.transpose(0, ctx.axis).flatten(1).sum(1)
    return grad * inside, of_scale, None, None


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, layout: str, axis: int) -> torch.Tensor:
        _keep(ctx, (x, scale, layout, axis), None)
        return _round(x, scale, layout, axis)

    backward = staticmethod(_gradients)


@torch.library.custom_op("tvm_qfp8::fake_quantize", mutates_args=())
def _fake_quantize(x: torch.Tensor, scale: torch.Tensor, layout: str, axis: int) -> torch.Tensor:
    return _round(x, scale, layout, axis)


@_fake_quantize.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, layout: str, axis: int) -> torch.Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor, str, int], output: Any) -> None:
    x, scale, ctx.layout, ctx.axis = inputs
    # A tracked scale changes in place before the backward pass.
    ctx.save_for_backward(x, scale.detach().clone())


_fake_quantize.register_autograd(_gradients, setup_context=_keep)
