"""``tvm-qfp8 report``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from tvm_qfp8.cli.console import StageProgress, check_writable, reports_errors, write_whole
from tvm_qfp8.cli.options import ParamOption, ShapeOption, calibration_data, parse_params, parse_shapes
from tvm_qfp8.errors import InputError, ModelError
from tvm_qfp8.layer_effect import LayerEffect


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
    input_shape: ShapeOption = None,
    param: ParamOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Write one self-contained page there, with error curves of the tables."),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="With --html: run the module here and show each kernel's time.")
    ] = False,
) -> None:
    """Print what became of each layer of a module.

    One line a layer: what it became, layouts of weight and activation, the dynamic bias b (scale = 2**-b), the
    signal to quantization error of its output in dB on the calibration samples, and bytes of weights.

    [bold]Examples[/bold]

    \b
    tvm-qfp8 report mobilenet.so
    tvm-qfp8 report mobilenet.so --json > report.json
    tvm-qfp8 report mobilenet.so --html report.html --profile
    # which layer to blame: each quantized alone, seen at the outputs
    tvm-qfp8 report mobilenet.onnx --sensitivity -c samples.npz
    tvm-qfp8 report mobilenet.onnx --sensitivity -c samples.npz --html blame.html
    """
    if profile and html is None:
        raise InputError(
            "--profile goes with --html PAGE.html; for times alone: tvm-qfp8 bench MODULE.so --profile"
        )
    if html is not None and as_json:
        raise InputError("--html is a form of its own; give it without --json")
    if sensitivity and profile:
        raise InputError("--profile runs a compiled module; give it without --sensitivity")
    if sensitivity:
        _sensitivity(module, calibration, input_shape or [], param or [], as_json, html)
        return
    if module.suffix == ".onnx":
        raise ModelError(f"{module} is not compiled yet; report reads a module, or takes --sensitivity")
    if html is not None:
        check_writable(html)
    import tvm_qfp8

    loaded = tvm_qfp8.load(module)
    found = loaded.report
    if html is not None:
        _write_page(html, found.to_html(_kernel_times(loaded) if profile else None))
        return
    typer.echo(found.to_json() if as_json else found.to_text())


def _write_page(path: Path, page: str) -> None:
    write_whole(path, lambda file: file.write(page.encode()))
    typer.echo(f"wrote {path}")


def _kernel_times(module: Any) -> list[Any]:
    from tvm_qfp8.cli.bench import random_input
    from tvm_qfp8.profiling import profile

    return profile(module, {info.name: random_input(info) for info in module.inputs})


def _sensitivity(
    model: Path,
    calibration: Path | None,
    input_shape: list[str],
    param: list[str],
    as_json: bool,
    html: Path | None,
) -> None:
    if not model.is_file():
        raise ModelError(f"no such model: {model}")
    if html is not None:
        check_writable(html)
    shapes = parse_shapes(input_shape)
    params = parse_params(param)
    samples = calibration_data(calibration)
    from tvm_qfp8.analysis import analyse

    with StageProgress(f"analysing {model.name}", as_json) as progress:
        found = analyse(
            str(model), calibration=samples, params=params, input_shapes=shapes or None, progress=progress
        )
    if html is not None:
        _write_page(html, found.to_html())
    elif as_json:
        typer.echo(json.dumps([asdict(effect) for effect in found.sensitivity], indent=1))
    else:
        _print_sensitivity(found.sensitivity)


def _print_sensitivity(effects: list[LayerEffect]) -> None:
    typer.echo(
        "signal to error in dB: of the model's outputs with this layer alone quantized, of its own output"
    )
    typer.echo(f"{'outputs':>8}{'own':>8}  layer")
    for effect in effects:
        own = "-" if effect.sqnr_db is None else f"{effect.sqnr_db:.1f}"
        typer.echo(f"{effect.output_sqnr_db:8.1f}{own:>8}  {effect.layer} ({effect.operator})")
