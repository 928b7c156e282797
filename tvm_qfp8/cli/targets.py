"""``tvm-qfp8 targets``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tvm_qfp8.cli.console import reports_errors

if TYPE_CHECKING:
    from tvm.target import Target

_SHOWN = (
    "sse4.2",
    "avx2",
    "fma",
    "f16c",
    "avx512bw",
    "avx512vnni",
    "avxvnni",
    "neon",
    "dotprod",
    "i8mm",
    "sve",
    "v",
)


def _cpu(target: Target) -> str:
    return str(target.attrs["mcpu"]) if "mcpu" in target.attrs else "generic"


@reports_errors
def targets(
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """List the names that --target takes.

    Beside these, LLVM's CPU names ([bold]skylake[/bold], [bold]cortex-a55[/bold]), TVM's tags
    ([bold]raspberry-pi/4b-aarch64[/bold]) and TVM's command line work:

    \b
    tvm-qfp8 compile ... --target "llvm -mtriple=aarch64-linux-gnu -mattr=+neon,+dotprod"
    """
    from rich.console import Console
    from rich.table import Table

    from tvm_qfp8.target_names import TARGETS
    from tvm_qfp8.targets import cpu_features, host_of, isa, parse_target

    rows = []
    for name, (description, _) in TARGETS.items():
        target = parse_target(name)
        row: dict[str, Any] = {"name": name, "description": description, "kind": target.kind.name}
        row["kernels"] = isa(target)
        if target.kind.name == "llvm":
            features = cpu_features(target)
            row["cpu"] = _cpu(target)
            row["features"] = [feature for feature in _SHOWN if feature in features]
        else:
            row["cpu"] = str(target.attrs["arch"])
            row["features"] = ["float16 tensor cores", f"host {_cpu(host_of(target))}"]
        rows.append(row)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table("name", "what it is", "CPU or arch", "kernels", "features", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row["name"], row["description"], row["cpu"], row["kernels"], " ".join(row["features"]))
    Console().print(table)
