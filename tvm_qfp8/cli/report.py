"""``tvm-qfp8 report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tvm_qfp8.cli.console import reports_errors


@reports_errors
def report(
    module: Annotated[
        Path, typer.Argument(metavar="MODULE.so", help="A module written by compile.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Print what became of each layer of a module.

    One line a layer: what it became, layouts of weight and activation, the dynamic bias b (scale = 2**-b), the
    signal to quantization error of its output in dB on the calibration samples, and bytes of weights.

    [bold]Examples[/bold]

    \b
    tvm-qfp8 report mobilenet.so
    tvm-qfp8 report mobilenet.so --json > report.json
    """
    import tvm_qfp8

    found = tvm_qfp8.load(module).report
    typer.echo(found.to_json() if as_json else found.to_text())
