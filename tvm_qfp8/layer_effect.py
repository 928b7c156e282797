"""What the sensitivity analysis says of a layer; apart from it, because reports hold it where no analysis is loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerEffect:
    """A quantized layer (linear, product of two activations, or embedding) and what it does to the outputs."""

    layer: str
    operator: str
    sqnr_db: float | None
    """Signal to error of its own output with all earlier layers quantized, from calibration."""
    output_sqnr_db: float
    """Signal to error of the module's outputs with this layer alone quantized."""
