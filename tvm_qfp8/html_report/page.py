"""Fills the page's template (``page.html.j2``): what needs arithmetic is done here, what is seen is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from tvm_qfp8.html_report.histogram import HEIGHT, WIDTH, Histogram, histogram
from tvm_qfp8.plots import table_svg
from tvm_qfp8.tables import build_table

if TYPE_CHECKING:
    from tvm_qfp8.profiling import KernelTime
    from tvm_qfp8.report import LayerReport, Report

POOR_DB, FAIR_DB = 15.0, 25.0
"""Below the first a layer is the first to blame, below the second worth a look: int8 networks lie about there."""


@dataclass(frozen=True)
class _Function:
    name: str
    layers: list[str]
    svg: str


def html_page(report: Report, kernels: Sequence[KernelTime] | None = None) -> str:
    """The page's text.

    Parameters
    ----------
    report : Report
    kernels : sequence of KernelTime, optional
        Times of one run's kernel calls, from ``profiling.profile``; without them the page has no times.
    """
    environment = Environment(
        loader=PackageLoader("tvm_qfp8.html_report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    measured = [layer for layer in report.layers if layer.sqnr_db is not None]
    return environment.get_template("page.html.j2").render(
        report=report,
        best_db=max((layer.sqnr_db for layer in measured if layer.sqnr_db is not None), default=1.0),
        worst=sorted(measured, key=lambda layer: layer.sqnr_db or 0.0)[:5],
        poor_db=POOR_DB,
        fair_db=FAIR_DB,
        best_output_db=max((effect.output_sqnr_db for effect in report.sensitivity), default=1.0),
        grids=[(layer, drawn) for layer in report.layers if (drawn := _histograms(layer))],
        width=WIDTH,
        height=HEIGHT,
        functions=_functions(report),
        kernels=kernels or (),
        slowest=max((kernel.microseconds for kernel in kernels or ()), default=1.0),
        total=sum(kernel.microseconds for kernel in kernels or ()),
    )


def _histograms(layer: LayerReport) -> list[Histogram]:
    """Of a layer's weights and of its activations, as far as they were stored."""
    stored = (
        ("weights", layer.weight_layout, layer.weights),
        ("activations", layer.activation_layout.split(" by ")[0], layer.activations),
    )
    return [histogram(what, layout, values) for what, layout, values in stored if values is not None]


def _functions(report: Report) -> list[_Function]:
    """Each interpolated function once, with the layers that are one."""
    layers: dict[str, list[str]] = {}
    for layer in report.layers:
        if layer.function:
            layers.setdefault(layer.function, []).append(layer.name)
    return [
        _Function(name, found, table_svg(build_table(name, max_error=report.max_error)))
        for name, found in layers.items()
    ]
