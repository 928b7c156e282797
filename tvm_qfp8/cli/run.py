"""``tvm-qfp8 run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tvm_qfp8.cli.console import check_writable, reports_errors, write_whole
from tvm_qfp8.cli.options import read_inputs


@reports_errors
def run(
    module: Annotated[
        Path, typer.Argument(metavar="MODULE.so", help="A module written by compile.", show_default=False)
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input", "-i", help="NAME=FILE.npy, or FILE.npz holding several inputs.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The .npz to write, an array for each output.")
    ] = None,
) -> None:
    """Run a module once on arrays from files.

    [bold]Examples[/bold]

    \b
    tvm-qfp8 run mobilenet.so --input image=photo.npy -o logits.npz
    tvm-qfp8 run bert.so --input sample.npz
    """
    if output is not None:
        check_writable(output)
    arrays = read_inputs(inputs or [])

    import numpy as np

    import tvm_qfp8

    loaded = tvm_qfp8.load(module)
    results = dict(zip((o.name for o in loaded.outputs), loaded.run(arrays), strict=True))
    for name, array in results.items():
        span = f", {array.min():.6g} to {array.max():.6g}" if array.size else ""
        typer.echo(f"{name}: {array.dtype} {tuple(array.shape)}{span}")
    if output is not None:
        write_whole(output, lambda file: np.savez(file, **results))
        typer.echo(f"wrote {output}")
