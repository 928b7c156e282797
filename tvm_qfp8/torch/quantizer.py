"""The part of a layer that rounds one tensor while it is trained: a layout, and scales that follow the tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tvm_qfp8.format import get_layout
from tvm_qfp8.torch.fake_quantize import PER_TENSOR, fake_quantize, grid_values, spread

MOVES = tuple(2.0 ** (sixteenths / 16) for sixteenths in (0, -1, 1, -4, 4))
"""What a tracked scale may be multiplied by: nothing, the step of the search that it began with, or four of these."""
LEAST_GAIN = 0.02
"""Share of the squared error that a move has to save: without, scales waver between equally good ones."""
MOST_TRACKED = 1 << 14
"""Values of an activation that decide where its scale moves."""


class Quantizer(nn.Module):
    """Rounds a tensor to a layout; passes it on as it is while no layout is set.

    In training each call moves the scale a step towards less squared error (tracked), or sets it to ``2 ** -bias`` of
    a parameter ``bias``, the format's dynamic bias (learned). Otherwise it is that of the last call in training.
    Layout and scale are part of the state dict.
    """

    scale: torch.Tensor

    def __init__(self, shape: tuple[int, ...] = (), axis: int = PER_TENSOR, learned: bool = False) -> None:
        super().__init__()
        self.layout: str | None = None
        self.axis = axis
        self.learned = learned
        self.register_buffer("scale", torch.ones(shape))
        if learned:
            self.bias = nn.Parameter(torch.zeros(shape))

    def start(self, layout: str, scale: Any) -> None:
        """Set layout and scale."""
        self.layout = get_layout(layout).name
        with torch.no_grad():
            self.scale.copy_(torch.as_tensor(scale, dtype=torch.float32).reshape(self.scale.shape))
            if self.learned:
                self.bias.copy_(-self.scale.log2())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` rounded, in its own dtype."""
        if self.layout is None:
            return x
        return fake_quantize(x, self.next_scale(x), self.layout, self.axis)

    def next_scale(self, x: torch.Tensor) -> torch.Tensor:
        """The scale to round ``x`` with, noted as the current one."""
        if not self.training or torch.compiler.is_exporting():
            return self.scale
        if not self.learned:
            self.track(x)
            return self.scale
        scale = torch.exp2(-self.bias)
        with torch.no_grad():
            self.scale.copy_(scale)
        return scale

    def next_row_scale(self, rows: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        """The scales of the rows ``used`` of a table, noted as their current ones; ``rows`` holds these rows."""
        if not self.training:
            return self.scale[used]
        if self.learned:
            scale = torch.exp2(-self.bias[used])
        else:
            scale = self.better_scale(rows.detach().float(), self.scale[used])
        with torch.no_grad():
            self.scale[used] = scale.detach()
        return scale

    def grid(self, x: torch.Tensor) -> torch.Tensor:
        """The grid values of ``x``, float32."""
        assert self.layout is not None
        wide = spread(self.scale, self.axis, x.dim())
        return grid_values(x.float(), wide, get_layout(self.layout))

    @torch.no_grad()
    def track(self, x: torch.Tensor) -> None:
        """Move the scale one step, up or down, where that rounds ``x`` better."""
        x = x.detach().float()
        if self.axis == PER_TENSOR:
            x = x.reshape(-1)[:: max(1, x.numel() // MOST_TRACKED)]
        self.scale.copy_(self.better_scale(x, self.scale))

    def better_scale(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """``scale`` times one of ``MOVES``, for each channel, where that has clearly less squared error."""
        assert self.layout is not None
        layout = get_layout(self.layout)
        candidates = torch.stack([scale * move for move in MOVES])
        errors = []
        for candidate in candidates:
            wide = spread(candidate, self.axis, x.dim())
            error = (grid_values(x, wide, layout).mul_(wide) - x).square_()
            errors.append(
                error.sum() if self.axis == PER_TENSOR else error.transpose(0, self.axis).flatten(1).sum(1)
            )
        errors[0] = errors[0] * (1 - LEAST_GAIN)
        # The first of equal errors: a channel of zeros keeps its scale.
        best = torch.stack(errors).argmin(0, keepdim=True)
        return candidates.gather(0, best)[0]

    def get_extra_state(self) -> str:
        """The layout; empty for none."""
        return self.layout or ""

    def set_extra_state(self, state: str) -> None:
        """Take a layout from a state dict."""
        self.layout = state or None

    def extra_repr(self) -> str:
        """Layout, axis and how the scale is found."""
        scales = "per tensor" if self.axis == PER_TENSOR else f"per index of axis {self.axis}"
        return f"{self.layout}, {scales}, {'learned' if self.learned else 'tracked'}"
