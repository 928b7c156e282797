"""Linear layers with rounded weights and inputs; each stands for torch's layer of the same parameters.

While training, and whenever gradients are asked for, a layer computes in float arithmetic on rounded tensors. Without
gradients, in eval mode, it computes what the compiled module does, to the bit: exact integer sums of grid values,
then ``fl32(fl32(sum) * a[c]) + bias[c]`` with the BatchNorm behind the layer, if any, taken into ``a`` and ``bias``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tvm_qfp8.torch.fake_quantize import PER_TENSOR, fake_quantize
from tvm_qfp8.torch.quantizer import Quantizer


class _Quantized(nn.Module):
    """What the layers share; ``norm`` is a BatchNorm that follows the layer in its model, or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    input_quantizer: Quantizer
    weight_quantizer: Quantizer
    norm: nn.Module | None
    channel_axis = 1

    def apply_weight(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Torch's own operator."""
        raise NotImplementedError

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Torch's layer on rounded tensors."""
        exporting = torch.compiler.is_exporting()
        inference = not (self.training or exporting or torch.is_grad_enabled())
        if inference and self.input_quantizer.layout is not None and self._norm_is_folded(input):
            with torch.autocast(input.device.type, enabled=False):
                return self._as_compiled(input).to(input.dtype)
        weight = self.weight_quantizer(self.weight)
        y = self.apply_weight(self.input_quantizer(input), weight, self.bias)
        return y if self.norm is None else self.norm(y)

    def _norm_is_folded(self, x: torch.Tensor) -> bool:
        norm = self.norm
        if norm is None:
            return True
        # Hooks see a BatchNorm's input only where it is called.
        watched = norm.training or norm._forward_pre_hooks or norm._forward_hooks
        # Behind a Linear of more than two dimensions a BatchNorm's channels are not the features.
        return not watched and (self.channel_axis == 1 or x.dim() == 2)

    def _as_compiled(self, x: torch.Tensor) -> torch.Tensor:
        grid, weight = self.input_quantizer.grid(x), self.weight_quantizer.grid(self.weight)
        # Sums of products of integers stay below 2**53.
        sums = self.apply_weight(grid.double(), weight.double(), None).float()
        scale, bias = self._scale_and_bias()
        channels = sums.shape[self.channel_axis]
        factor = scale.repeat(channels // scale.numel()) * self.input_quantizer.scale
        shape = [1] * sums.dim()
        shape[self.channel_axis] = -1
        y = sums * factor.reshape(shape)
        return y if bias is None else y + bias.reshape(shape)

    def _scale_and_bias(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight's scales times BatchNorm's factors, and its shift: folded in float64, as the compiler does."""
        scale, norm = self.weight_quantizer.scale.reshape(-1), self.norm
        if norm is None:
            return scale, self.bias
        shift = torch.zeros_like(norm.running_mean, dtype=torch.float64)
        if self.bias is not None:
            shift = shift + self.bias.double()
        # torch's float32 root is not always the nearest number; float64's, rounded, is.
        deviation = torch.sqrt((norm.running_var + norm.eps).double()).float()
        inverse = deviation.double().reciprocal()
        shift = (shift - norm.running_mean.double()) * inverse
        factor = inverse
        if norm.weight is not None:
            factor, shift = inverse * norm.weight.double(), shift * norm.weight.double()
            shift = shift + norm.bias.double()
        return (scale.double() * factor).float(), shift.float()


class QATLinear(_Quantized, nn.Linear):
    """``torch.nn.Linear``, a weight scale per output feature."""

    channel_axis = -1

    def apply_weight(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(x, weight, bias)


class QATConv1d(_Quantized, nn.Conv1d):
    """``torch.nn.Conv1d``, a weight scale per output channel."""

    def apply_weight(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.conv1d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class QATConv2d(_Quantized, nn.Conv2d):
    """``torch.nn.Conv2d``, a weight scale per output channel."""

    def apply_weight(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class QATConvTranspose2d(_Quantized, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d``, a weight scale per output channel of a group."""

    def apply_weight(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.conv_transpose2d(
            x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )


class QATEmbedding(nn.Embedding):
    """``torch.nn.Embedding`` of rounded rows, a scale per row; only the rows in use are rounded."""

    weight_quantizer: Quantizer

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows of the rounded table."""
        quantizer = self.weight_quantizer
        if torch.compiler.is_exporting():
            return functional.embedding(input, quantizer(self.weight), self.padding_idx)
        assert quantizer.layout is not None
        used = input.reshape(-1)
        rows = super().forward(used)
        rounded = fake_quantize(rows, quantizer.next_row_scale(rows, used), quantizer.layout, 0)
        return rounded.reshape(*input.shape, self.embedding_dim)


LAYERS: dict[type[nn.Module], tuple[type[nn.Module], int]] = {
    nn.Linear: (QATLinear, 0),
    nn.Conv1d: (QATConv1d, 0),
    nn.Conv2d: (QATConv2d, 0),
    nn.ConvTranspose2d: (QATConvTranspose2d, 1),
    nn.Embedding: (QATEmbedding, 0),
}
"""By torch's layer: ours, and the weight's axis of output channels (of rows for Embedding)."""


def reason_to_skip(layer: nn.Module) -> str | None:
    """Why a layer of these types keeps its float arithmetic, or None."""
    if layer.weight.dtype != torch.float32:
        return (
            f"its weight is {layer.weight.dtype}; prepare the model in float32, and train it under autocast"
        )
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return f"padding_mode is {layer.padding_mode!r}; 'zeros' is supported"
    if getattr(layer, "max_norm", None) is not None:
        return "max_norm changes the weight in forward"
    return None


def to_qat(
    layer: nn.Module, weights: str, per_channel: bool, learned: bool, find: Callable[..., Any]
) -> None:
    """Turn a layer of ``LAYERS`` into ours, in place: parameters, hooks and optimizers that hold them stay.

    ``find(array, axis=..., layout=...)`` is ``tvm_qfp8.quantize``.
    """
    kind, axis = LAYERS[type(layer)]
    rows = kind is QATEmbedding
    layer.__class__ = kind
    if not rows:
        layer.norm = None
        layer.input_quantizer = Quantizer(learned=learned)
    one = not (per_channel or rows)
    shape = () if one else (layer.weight.shape[axis],)
    layer.weight_quantizer = Quantizer(shape, PER_TENSOR if one else axis, learned)
    layer.weight_quantizer.train(layer.training)
    found = find(layer.weight.detach().cpu().numpy(), axis=None if one else axis, layout=weights)
    layer.weight_quantizer.to(layer.weight.device).start(weights, found.scale)
    if not rows:
        layer.input_quantizer.train(layer.training).to(layer.weight.device)
