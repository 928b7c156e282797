"""``tvm-qfp8 tune``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tvm_qfp8.cli.console import StageProgress, reports_errors
from tvm_qfp8.cli.options import ParamOption, ShapeOption, calibration_data, parse_params, parse_shapes
from tvm_qfp8.errors import ModelError

if TYPE_CHECKING:
    from tvm_qfp8.tuning.tuner import TuningResult


@reports_errors
def tune(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL.onnx", help="The model to tune for.", show_default=False)
    ],
    target: Annotated[
        str, typer.Option("--target", "-t", help="What it will run on: see [bold]tvm-qfp8 targets[/bold].")
    ] = "native",
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration", "-c", help="Samples, as for [bold]compile[/bold]: they decide the layouts."
        ),
    ] = None,
    input_shape: ShapeOption = None,
    param: ParamOption = None,
    trials: Annotated[
        int, typer.Option("--trials", min=1, help="Schedules to try per kernel, those in the log included.")
    ] = 200,
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0.1, help="Stop after so many minutes.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads to tune for; the target's cores.")
    ] = None,
    logs: Annotated[
        Path | None, typer.Option("--logs", help="Folder of logs; by default your own, which compile reads.")
    ] = None,
    tracker: Annotated[
        str | None,
        typer.Option("--tracker", metavar="HOST:PORT", help="Measure on boards of this RPC tracker."),
    ] = None,
    key: Annotated[str | None, typer.Option("--key", help="The boards' key at the tracker.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Search for faster schedules with MetaSchedule, and log what was found.

    Ctrl-C stops cleanly; the same command goes on where it stopped. The next compile for the same target uses the log.

    [bold]Examples[/bold]

    \b
    tvm-qfp8 tune mobilenet.onnx -c samples.npz --minutes 30
    # for a Raspberry Pi 4, on the boards that a tracker knows (docs/tuning.md)
    tvm-qfp8 tune mobilenet.onnx -c samples.npz -t rpi4 --tracker 127.0.0.1:9190 --key rpi4
    """
    shapes = parse_shapes(input_shape or [])
    params = parse_params(param or [])
    if not model.is_file():
        raise ModelError(f"no such model: {model}")
    if (tracker is None) != (key is None):
        raise typer.BadParameter("--tracker and --key belong together")
    samples = calibration_data(calibration)

    import tvm_qfp8
    from tvm_qfp8.targets import parse_target
    from tvm_qfp8.tuning.logs import user_root
    from tvm_qfp8.tuning.session import tune_workloads

    parsed = parse_target(target)
    threads = threads or int(parsed.attrs.get("num-cores", 0)) or 1
    # The measuring processes take their number of threads from here.
    os.environ["TVM_NUM_THREADS"] = str(threads)
    from tvm_qfp8.tuning.collect import collect_workloads

    with StageProgress(f"reading {model.name}", quiet) as progress:
        workloads = collect_workloads(
            str(model),
            parsed,
            params=params,
            input_shapes=shapes or None,
            calibration=samples,
            config=tvm_qfp8.Config(threads=threads),
            progress=progress,
        )
    session = tune_workloads(
        workloads,
        parsed,
        logs or user_root(),
        trials=trials,
        minutes=minutes,
        tracker=tracker,
        key=key,
        quiet=quiet,
    )
    typer.echo(format_results(session.results))
    if session.interrupted:
        typer.echo("stopped; the same command goes on from here")
    typer.echo(
        f"log: {session.folder}" + (" (emulated: not used for real targets)" if session.emulated else "")
    )


def format_results(results: list[TuningResult]) -> str:
    """One line for each kernel, then the gain of all kernels of the model together."""
    lines = [f"{'kernel':44}{'trials':>7}{'failed':>7}{'default us':>12}{'tuned us':>10}{'gain':>7}"]
    before = after = 0.0
    for result in sorted(results, key=lambda r: -r.default * r.calls):
        if result.default == float("inf") or result.best == float("inf"):
            lines.append(f"{str(result.workload):44}{result.trials:7}{result.failed:7}{'not measured':>12}")
            continue
        before += result.default * result.calls
        after += result.best * result.calls
        lines.append(
            f"{str(result.workload):44}{result.trials:7}{result.failed:7}"
            f"{result.default * 1e6:12.1f}{result.best * 1e6:10.1f}{result.gain:6.2f}x"
        )
    if after:
        lines.append(
            f"all calls of these kernels: {before * 1e3:.2f} ms -> {after * 1e3:.2f} ms, {before / after:.2f}x"
        )
    return "\n".join(lines)
