"""``tvm-qfp8 compile``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tvm_qfp8.cli.console import StageProgress, check_writable, reports_errors
from tvm_qfp8.cli.options import ParamOption, calibration_data, parse_params, parse_shapes
from tvm_qfp8.errors import ModelError


@reports_errors
def compile_model(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL.onnx", help="The .onnx file, as downloaded.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The module to write.", show_default=False)],
    target: Annotated[
        str, typer.Option("--target", "-t", help="What it will run on: see [bold]tvm-qfp8 targets[/bold].")
    ] = "native",
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            "-c",
            help="Samples of real inputs: one .npz, or a folder of them. Without samples most layers find "
            "scales at run time, which is slower, and attention and depthwise convolutions stay float32.",
        ),
    ] = None,
    input_shape: Annotated[
        list[str] | None,
        typer.Option(
            "--input-shape",
            "-s",
            help="NAME=1,3,224,224 where the model leaves dimensions open; NAME=N,... for any batch, NAME=1,..128 "
            "for lengths up to 128, NAME=1,32/64/128 for these.",
        ),
    ] = None,
    param: ParamOption = None,
    max_error: Annotated[
        float,
        typer.Option("--max-error", min=1e-7, max=0.5, help="Bound on the error of each nonlinear layer."),
    ] = 1e-3,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            "--skip", help="Layer to leave in float32: a name of the report, or a pattern such as 'conv_1*'."
        ),
    ] = None,
    activations: Annotated[
        str,
        typer.Option(
            "--activations",
            help="Layout of all activations; auto picks the best for each, float32 quantizes weights only.",
        ),
    ] = "auto",
    method: Annotated[
        str,
        typer.Option("--method", help="How activation scales are found: mse, max, percentile or entropy."),
    ] = "mse",
    byte_loss_db: Annotated[
        float | None,
        typer.Option(
            "--byte-loss-db",
            min=0.0,
            help="Decibels of the outputs' accuracy that faster layouts may cost: 0 for the most accurate module, "
            "6 for the fastest.",
            show_default="1.5 to 4.5, where outputs have them to spare",
        ),
    ] = None,
    recalibrate_batchnorm: Annotated[
        bool,
        typer.Option(
            "--recalibrate-batchnorm",
            help="Estimate BatchNorm's statistics anew on the calibration samples, where that serves.",
        ),
    ] = False,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads to write kernels for; the target's cores.")
    ] = None,
    winograd: Annotated[
        bool,
        typer.Option(
            "--winograd/--no-winograd",
            help="Whether 3x3 convolutions may take memory (not file size) to be two or three times as fast.",
        ),
    ] = True,
    cc: Annotated[str | None, typer.Option("--cc", help="C++ compiler that links for the target.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no report.")] = False,
) -> None:
    """Compile a trained float network to a QFP8 module.

    [bold]Examples[/bold]

    \b
    # for this machine, with calibration samples (arrays named like the model's inputs)
    tvm-qfp8 compile mobilenet.onnx -c samples.npz -o mobilenet.so
    # without samples: layers find scales at run time
    tvm-qfp8 compile bert.onnx -s input_ids=1,128 -s attention_mask=1,128 -o bert.so
    # dimensions that the file leaves open
    tvm-qfp8 compile bert.onnx -s input_ids=1,128 -s attention_mask=1,128 -c samples/ -o bert.so
    # an input that is always the same
    tvm-qfp8 compile vad.onnx -s input=1,576 -s state=2,1,128 -p sr=16000 -o vad.so
    # for a Raspberry Pi 4
    tvm-qfp8 compile mobilenet.onnx -c samples.npz --target rpi4 -o mobilenet-rpi4.so
    """
    shapes = parse_shapes(input_shape or [])
    params = parse_params(param or [])
    check_writable(output)
    if not model.is_file():
        raise ModelError(f"no such model: {model}")
    samples = calibration_data(calibration)

    import tvm_qfp8
    from tvm_qfp8.linker import linker
    from tvm_qfp8.targets import isa, parse_target

    parsed = parse_target(target)
    isa(parsed)
    link = linker(parsed, cc)
    config = tvm_qfp8.Config(
        max_error=max_error,
        skip=tuple(skip or ()),
        activations=activations,
        method=method,
        byte_loss_db=byte_loss_db,
        recalibrate_batchnorm=recalibrate_batchnorm,
        threads=threads,
        winograd=winograd,
    )
    with StageProgress(f"compiling {model.name}", quiet) as progress:
        module = tvm_qfp8.compile(
            str(model),
            parsed,
            params=params,
            input_shapes=shapes or None,
            calibration=samples,
            config=config,
            progress=progress,
        )
        module.export_library(output, fcompile=link)
    if not quiet:
        typer.echo(module.report.to_text())
        typer.echo(f"wrote {output} ({output.stat().st_size / 2**20:.1f} MiB)")
