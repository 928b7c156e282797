"""Draws every named function with its table, its cells and its error curve, one file a function."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from tvm_qfp8.plots import FORMATS, figure_bytes, table_figure
from tvm_qfp8.tables import FUNCTIONS, build_table
from tvm_qfp8.tables.derivatives import DERIVATIVES

NAMES = (*FUNCTIONS, "elu(0.5)", "celu(1.3)", "pow(1.7)", *DERIVATIVES, "elu'", "selu'")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/function_plots"))
    parser.add_argument("--functions", default=",".join(NAMES), help="names, separated by commas")
    parser.add_argument("--max-error", type=float, default=1e-3)
    parser.add_argument("--format", choices=FORMATS, default="svg")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.functions.split(","):
        path = arguments.folder / f"{file_name(name)}.{arguments.format}"
        table = build_table(name, arguments.max_error)
        path.write_bytes(figure_bytes(table_figure(table), arguments.format))
        print(path)


def file_name(function: str) -> str:
    """A name for any file system: ``elu(0.5)'`` becomes ``elu_0.5_derivative``."""
    return re.sub(r"[()]+", "_", function.replace("'", "_derivative")).replace("__", "_").strip("_")


if __name__ == "__main__":
    main()
