"""The command ``tvm-qfp8``: a thin layer over the public API.

Each command imports TVM and the compiler only when it runs, so that ``--help`` answers at once. Exit codes: 0 done,
1 a ``QFP8Error`` (one line on standard error), 2 wrong usage.
"""

from __future__ import annotations

from typing import Annotated

import typer

from tvm_qfp8.cli.bench import bench
from tvm_qfp8.cli.bundle import bundle
from tvm_qfp8.cli.compile import compile_model
from tvm_qfp8.cli.report import report
from tvm_qfp8.cli.run import run
from tvm_qfp8.cli.table import table
from tvm_qfp8.cli.targets import targets
from tvm_qfp8.cli.tune import tune

app = typer.Typer(
    name="tvm-qfp8",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compile")(compile_model)
app.command("run")(run)
app.command("bench")(bench)
app.command("tune")(tune)
app.command("report")(report)
app.command("bundle")(bundle)
app.command("table")(table)
app.command("targets")(targets)


def _version(asked: bool) -> None:
    if asked:
        from tvm_qfp8 import __version__

        typer.echo(f"tvm-qfp8 {__version__}")
        raise typer.Exit()


@app.callback()
def _describe(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Compile trained networks to 8-bit floats (QFP8) with Apache TVM, and run them.

    \b
    tvm-qfp8 compile model.onnx --calibration samples.npz -o model.so
    tvm-qfp8 report model.so
    tvm-qfp8 run model.so --input image=photo.npy -o result.npz
    """


def main() -> None:
    """Entry point of the console script."""
    app()
