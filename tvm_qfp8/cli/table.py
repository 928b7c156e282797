"""``tvm-qfp8 table``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tvm_qfp8.cli.console import check_writable, reports_errors, write_whole


@reports_errors
def table(
    name: Annotated[
        str, typer.Argument(help="gelu, silu, exp, elu(0.5), pow(1.7), gelu' ...", show_default=False)
    ],
    max_error: Annotated[float, typer.Option("--max-error", "-e", help="Bound of the error.")] = 1e-3,
    domain: Annotated[
        tuple[float, float] | None,
        typer.Option("--domain", help="Lowest and highest argument; every float32 without."),
    ] = None,
    relative: Annotated[
        bool, typer.Option("--relative", help="Bound the relative error, on a domain.")
    ] = False,
    continuous: Annotated[bool, typer.Option("--continuous", help="Neighbouring cells meet.")] = False,
    monotone: Annotated[
        bool, typer.Option("--monotone", help="Rise and fall where the function does.")
    ] = False,
    exact_at: Annotated[
        list[float] | None, typer.Option("--exact-at", help="An argument to be exact at; may be repeated.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw function and error: a .png, .svg or .pdf.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of text.")] = False,
) -> None:
    """Build the table of a nonlinear function: its form, size, proved bound and observed error.

    The error is |y - f(x)| / max(1, |f(x)|), or |y - f(x)| / |f(x)| for exp, exp2, reciprocal, rsqrt, sqrt and pow.

    [bold]Examples[/bold]

    \b
    tvm-qfp8 table gelu --max-error 1e-4 --plot gelu.png
    tvm-qfp8 table tanh --monotone --exact-at 1
    tvm-qfp8 table exp --domain -87 0
    """
    kind = "" if plot is None else plot.suffix.removeprefix(".").lower()
    if plot is not None:
        # Before any work: the package that draws, the kind of file, the folder.
        from tvm_qfp8.plots import check_kind

        check_kind(kind)
        check_writable(plot)
    from tvm_qfp8.tables import build_table

    found = build_table(
        name,
        max_error,
        domain,
        relative,
        continuous=continuous,
        exact_at=tuple(exact_at or ()),
        monotone=monotone,
    )
    facts = {
        "function": found.name,
        "reduction": found.reduction,
        "cells": found.cells,
        "degree": max(found.degree, 0),
        "bytes": found.nbytes,
        "error": "relative" if found.relative else "absolute up to 1, relative above",
        "proved bound": found.max_error,
        "observed": found.observed_error,
    }
    if found.continuous:
        facts["continuous"] = True
    if found.reversal is not None:
        facts["against the function's course"] = found.reversal
    if plot is not None:
        from tvm_qfp8.plots import figure_bytes, table_figure

        drawn = figure_bytes(table_figure(found, domain=domain), kind)
        write_whole(plot, lambda stream: stream.write(drawn))
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        typer.echo(f"{key:{width}}  {f'{value:.3e}' if isinstance(value, float) else value}")
    if plot is not None:
        typer.echo(f"{'plot':{width}}  {plot}")
