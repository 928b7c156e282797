"""``tvm-qfp8 bundle``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tvm_qfp8.cli.console import reports_errors
from tvm_qfp8.errors import ModelError


@reports_errors
def bundle(
    module: Annotated[
        Path, typer.Argument(metavar="MODEL.so", help="A module, for any machine.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.", show_default=False)],
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help="The target it was compiled for; checked against the file."),
    ] = None,
) -> None:
    """Put a module, TVM's runtime and two small runners (C++ and Python) into one folder for a board.

    [bold]Examples[/bold]

    \b
    tvm-qfp8 compile mobilenet.onnx -c samples.npz --target rpi4 -o mobilenet.so
    tvm-qfp8 bundle mobilenet.so --target rpi4 -o mobilenet-rpi4/
    scp -r mobilenet-rpi4 pi@board: && ssh pi@board ./mobilenet-rpi4/run image.npy
    """
    if module.suffix == ".onnx":
        raise ModelError(f"{module} is not compiled yet: tvm-qfp8 compile {module} --target ... -o MODEL.so")
    from tvm_qfp8.bundling import bundle as write_bundle

    folder = write_bundle(module, output, target)
    sizes = {path: path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    for path, size in sizes.items():
        if path.relative_to(folder).parts[0] != "include":
            typer.echo(f"{size / 2**20:8.2f} MiB  {path.relative_to(folder)}")
    typer.echo(f"{sum(sizes.values()) / 2**20:8.2f} MiB  in all, in {folder}")
    if not (folder / "run").exists() or not any((folder / "lib").iterdir()):
        typer.echo(f"{folder / 'README.md'} says what is still to be built")
