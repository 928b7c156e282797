"""``tvm-qfp8 bench``."""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tvm_qfp8.cli.console import StageProgress, reports_errors
from tvm_qfp8.cli.options import (
    ParamOption,
    ShapeOption,
    calibration_data,
    parse_params,
    parse_shapes,
    read_inputs,
)
from tvm_qfp8.errors import ModelError

if TYPE_CHECKING:
    import numpy as np

OTHER_FLOATS = {"tensor(float16)": "float16", "tensor(double)": "float64"}
"""Inputs of a file that are float32 in its module."""


@reports_errors
def bench(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A module (.so) or a model (.onnx).", show_default=False)
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input", "-i", help="NAME=FILE.npy or FILE.npz; random values without.", show_default=False
        ),
    ] = None,
    input_shape: ShapeOption = None,
    param: ParamOption = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", "-c", help="Samples to compile an .onnx with.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of every contestant.")] = 1,
    repeat: Annotated[
        int, typer.Option("--repeat", "-n", min=1, help="Timed calls; the median counts.")
    ] = 30,
    profile: Annotated[
        bool, typer.Option("--profile", help="Time and memory traffic of every kernel instead.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Time a module; for an .onnx also the float model in onnxruntime, where that is installed.

    Calls alternate between the contestants, so that a busy moment of the machine hits all.

    [bold]Examples[/bold]

    \b
    tvm-qfp8 bench mobilenet.so --threads 2
    tvm-qfp8 bench mobilenet.onnx -c samples.npz
    tvm-qfp8 bench mobilenet.so --profile
    """
    shapes = parse_shapes(input_shape or [])
    params = parse_params(param or [])
    given = read_inputs(inputs or [])
    if not model.is_file():
        raise ModelError(f"no such file: {model}")
    # TVM and OpenMP read these once, when their thread pools start.
    os.environ["TVM_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(threads)

    import tvm_qfp8

    contestants: dict[str, Any] = {}
    if model.suffix == ".onnx":
        samples = calibration_data(calibration)
        config = tvm_qfp8.Config(threads=threads)
        with StageProgress(f"compiling {model.name}", as_json) as progress:
            module = tvm_qfp8.compile(
                str(model),
                params=params,
                input_shapes=shapes or None,
                calibration=samples,
                config=config,
                progress=progress,
            )
        float_model = _onnxruntime(model, threads, params, shapes)
        if float_model is not None:
            contestants["onnxruntime float32"] = float_model
    else:
        module = tvm_qfp8.load(model)
    contestants["QFP8"] = module.run
    arrays = {info.name: given.get(info.name, random_input(info)) for info in module.inputs}
    if profile:
        _print_profile(module, arrays, repeat, as_json)
        return
    times = _alternate(contestants, arrays, repeat)
    rows = [
        {
            "name": name,
            "median_ms": statistics.median(values) * 1e3,
            "fastest_ms": min(values) * 1e3,
            "slowest_ms": max(values) * 1e3,
        }
        for name, values in times.items()
    ]
    if as_json:
        typer.echo(
            json.dumps({"model": str(model), "threads": threads, "repeat": repeat, "results": rows}, indent=1)
        )
        return
    typer.echo(f"{model.name}, {threads} thread{'s' * (threads > 1)}, {repeat} calls, milliseconds")
    typer.echo(f"{'':24}{'median':>10}{'fastest':>10}{'slowest':>10}")
    for row in rows:
        typer.echo(
            f"{row['name']:24}{row['median_ms']:10.3f}{row['fastest_ms']:10.3f}{row['slowest_ms']:10.3f}"
        )


def _print_profile(module: Any, arrays: dict[str, np.ndarray], repeat: int, as_json: bool) -> None:
    from dataclasses import asdict

    from tvm_qfp8.profiling import profile

    kernels = profile(module, arrays, repeat)
    if as_json:
        typer.echo(json.dumps([asdict(kernel) for kernel in kernels], indent=1))
        return
    total = sum(kernel.microseconds for kernel in kernels)
    wide = max(len(kernel.kernel) for kernel in kernels)
    typer.echo(f"{'us':>9}{'share':>7}{'KiB':>9}  {'kernel':{wide}}  layer")
    for kernel in kernels:
        share = kernel.microseconds / total
        name = f"{kernel.kernel:{wide}}  {kernel.layer}"
        typer.echo(f"{kernel.microseconds:9.1f}{share:7.1%}{kernel.bytes / 1024:9.0f}  {name}")
    typer.echo(
        f"{total:9.1f}{'':7}{sum(k.bytes for k in kernels) / 1024:9.0f}  in all, {len(kernels)} kernels"
    )


def _alternate(
    contestants: dict[str, Any], arrays: dict[str, np.ndarray], repeat: int
) -> dict[str, list[float]]:
    """Seconds of each call, after two that do not count."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(-2, repeat):
        for name, call in contestants.items():
            started = time.perf_counter()
            call(arrays)
            if turn >= 0:
                times[name].append(time.perf_counter() - started)
    return times


def random_input(info: Any) -> np.ndarray:
    """Values that any model takes: normal floats, and integers 0 or 1 since they may be indices or masks."""
    import numpy as np

    generator = np.random.default_rng(0)
    if info.dtype.startswith("float"):
        return generator.standard_normal(info.shape).astype(info.dtype)
    return generator.integers(0, 2, info.shape).astype(info.dtype)


def _onnxruntime(model: Path, threads: int, params: dict[str, Any], shapes: dict[str, Any]) -> Any:
    try:
        import onnxruntime
    except ImportError:
        return None
    source: str | bytes = str(model)
    if params:
        import onnx

        from tvm_qfp8.importers.onnx_inputs import bind_inputs

        bound = onnx.load(source)
        bind_inputs(bound, params, shapes)
        source = bound.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    kinds = {value.name: OTHER_FLOATS.get(value.type) for value in session.get_inputs()}

    def run(arrays: dict[str, np.ndarray]) -> Any:
        return session.run(
            None,
            {name: array.astype(kinds[name] or array.dtype, copy=False) for name, array in arrays.items()},
        )

    return run
