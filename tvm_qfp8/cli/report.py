"""``tvm-qfp8 report``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tvm_qfp8.cli.console import StageProgress, reports_errors
from tvm_qfp8.cli.options import calibration_data, parse_shapes
from tvm_qfp8.errors import ModelError


@reports_errors
def report(
    module: Annotated[
        Path,
        typer.Argument(
            metavar="MODULE.so",
            help="A module written by compile; an .onnx with --sensitivity.",
            show_default=False,
        ),
    ],
    sensitivity: Annotated[
        bool,
        typer.Option("--sensitivity", help="Rank an .onnx model's layers by the harm of quantizing each."),
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", "-c", help="Samples, for --sensitivity.")
    ] = None,
    input_shape: Annotated[
        list[str] | None,
        typer.Option("--input-shape", "-s", help="NAME=1,3,224,224 where an .onnx leaves dimensions open."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Print what became of each layer of a module.

    One line a layer: what it became, layouts of weight and activation, the dynamic bias b (scale = 2**-b), the
    signal to quantization error of its output in dB on the calibration samples, and bytes of weights.

    [bold]Examples[/bold]

    \b
    tvm-qfp8 report mobilenet.so
    tvm-qfp8 report mobilenet.so --json > report.json
    # which layer to blame: each quantized alone, seen at the outputs
    tvm-qfp8 report mobilenet.onnx --sensitivity -c samples.npz
    """
    if sensitivity:
        _print_sensitivity(module, calibration, input_shape or [], as_json)
        return
    if module.suffix == ".onnx":
        raise ModelError(f"{module} is not compiled yet; report reads a module, or takes --sensitivity")
    import tvm_qfp8

    found = tvm_qfp8.load(module).report
    typer.echo(found.to_json() if as_json else found.to_text())


def _print_sensitivity(model: Path, calibration: Path | None, input_shape: list[str], as_json: bool) -> None:
    if not model.is_file():
        raise ModelError(f"no such model: {model}")
    shapes = parse_shapes(input_shape)
    samples = calibration_data(calibration)
    import tvm_qfp8

    with StageProgress(f"analysing {model.name}", as_json) as progress:
        effects = tvm_qfp8.sensitivity(
            str(model), calibration=samples, input_shapes=shapes or None, progress=progress
        )
    if as_json:
        typer.echo(json.dumps([asdict(effect) for effect in effects], indent=1))
        return
    typer.echo(
        "signal to error in dB: of the model's outputs with this layer alone quantized, of its own output"
    )
    typer.echo(f"{'outputs':>8}{'own':>8}  layer")
    for effect in effects:
        own = "-" if effect.sqnr_db is None else f"{effect.sqnr_db:.1f}"
        typer.echo(f"{effect.output_sqnr_db:8.1f}{own:>8}  {effect.layer} ({effect.operator})")
