"""What became of each layer: the report of a compiled module, as text, JSON and a page of HTML."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from tvm_qfp8.distribution import Distribution
from tvm_qfp8.layer_effect import LayerEffect

if TYPE_CHECKING:
    from tvm_qfp8.profiling import KernelTime


@dataclass
class LayerReport:
    """One layer.

    ``sqnr_db`` is signal to error of the layer's output on calibration data, every earlier layer quantized.
    ``bias`` is the dynamic bias b of the activation, scale = 2**-b. ``function`` names the table that a nonlinear layer
    became, for ``build_table``. ``weights`` and ``activations`` are how the values lie on their layouts' grids.
    """

    name: str
    operator: str
    became: str
    weight_layout: str = ""
    activation_layout: str = ""
    activation_bias: float | None = None
    sqnr_db: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    reason: str = ""
    function: str = ""
    weights: Distribution | None = None
    activations: Distribution | None = None


@dataclass
class Report:
    """All layers in execution order, and notes on the whole model."""

    target: str = ""
    layers: list[LayerReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    totals: dict[str, Any] = field(default_factory=dict)
    max_error: float = 1e-3
    """What the tables were made for."""
    sensitivity: list[LayerEffect] = field(default_factory=list)
    """Layers by the harm that each alone does to the outputs, where that was analysed; most harmful first."""

    def to_json(self) -> str:
        """The report as a JSON object."""
        text = json.dumps(asdict(self), indent=1)
        # Lists of numbers on one line each; a line break stands in no JSON string.
        return re.sub(r"\[\n[\d\s,]+\]", lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The inverse of ``to_json``."""
        data = json.loads(text)
        layers = [LayerReport(**layer) for layer in data.pop("layers")]
        for layer in layers:
            for name in ("weights", "activations"):
                stored = getattr(layer, name)
                if stored is not None:
                    setattr(layer, name, Distribution(**stored))
        effects = [LayerEffect(**effect) for effect in data.pop("sensitivity", [])]
        return cls(layers=layers, sensitivity=effects, **data)

    def to_html(self, kernels: Sequence[KernelTime] | None = None) -> str:
        """The report as one page without outside references: layers, distributions on the grid, error curves of tables.

        ``kernels`` are times from ``profiling.profile``, shown where given.

        Raises
        ------
        MissingPackageError
            The extra ``report`` is not installed.
        """
        from tvm_qfp8.html_report import html_page

        return html_page(self, kernels)

    def to_text(self) -> str:
        """A table, one line per layer, then totals and notes."""
        header = ("layer", "operator", "became", "weight", "activation", "b", "SQNR dB", "bytes", "")
        rows = [header]
        for layer in self.layers:
            rows.append(
                (
                    layer.name,
                    layer.operator,
                    layer.became,
                    layer.weight_layout,
                    layer.activation_layout,
                    "" if layer.activation_bias is None else f"{layer.activation_bias:.2f}",
                    "" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}",
                    f"{layer.bytes_before} -> {layer.bytes_after}" if layer.bytes_before else "",
                    layer.reason,
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.insert(1, "-" * min(sum(widths) + 2 * len(widths), 160))
        lines += [f"{key}: {value}" for key, value in self.totals.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.to_text()
