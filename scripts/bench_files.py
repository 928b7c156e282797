"""Times networks of Python packages, from their ONNX files as they come, against what a user would run instead.

onnxruntime and OpenVINO in float32, OpenVINO in its default precision (bfloat16 where the CPU has it), and NNCF's int8
run by OpenVINO, calibrated on the same samples, what stays float in float32; one thread. QFP8 with these samples and
without any. Contestants take turns in one process; a turn is one call that does not count and some timed ones. Times
are medians, ratios the median of the turns' ratios. SQNR is that of outputs on other inputs against onnxruntime's
float32, in decibels, the mean over outputs.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["TVM_NUM_THREADS"] = "1"

import argparse
import functools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
OURS, UNCALIBRATED, FLOAT32 = "QFP8", "QFP8 without samples", "onnxruntime float32"
SAMPLES, HELD_OUT = 16, 4

Inputs = Mapping[str, np.ndarray]
Run = Callable[[Inputs], Sequence[np.ndarray]]


def main() -> None:
    from zoo.machine import describe_machine
    from zoo.packaged import MODELS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--only", default="", help="part of the names of the files to run")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "results" / "bench_files.json")
    arguments = parser.parse_args()
    rows = []
    for packaged in MODELS:
        if arguments.only in packaged.name:
            rows.append(measure(packaged, arguments.turns))
            print_row(rows[-1])
    record = {"machine": describe_machine(), "turns": arguments.turns, "samples": SAMPLES, "rows": rows}
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {arguments.output}")


def print_row(row: dict[str, Any]) -> None:
    """One line."""
    peers = "  ".join(f"{name} x{ratio:.2f}" for name, ratio in row["times as fast as"].items())
    decibels = " ".join(f"{value:.1f}" for value in row["sqnr_db"].values())
    print(f"{row['file']:44} {row['milliseconds'][OURS]:8.2f} ms   {peers}   dB {decibels}", flush=True)


def measure(packaged, turns: int) -> dict[str, Any]:
    """Compile times, times of all contestants, ratios and SQNR of one file."""
    import tvm_qfp8
    from zoo.contest import contest_on_one_thread

    calibration, held_out = packaged.samples(SAMPLES, seed=0), packaged.samples(HELD_OUT, seed=1)
    shapes = {name: array.shape for name, array in held_out[0].items()}
    runs: dict[str, Run] = {}
    compile_seconds = {}
    for name, samples in ((OURS, calibration), (UNCALIBRATED, None)):
        began = time.perf_counter()
        module = tvm_qfp8.compile(
            str(packaged.path()),
            "native",
            params=packaged.params,
            input_shapes=shapes,
            calibration=samples,
            config=tvm_qfp8.Config(threads=1),
        )
        compile_seconds[name] = time.perf_counter() - began
        runs[name] = module.run
    others, failed = peers(packaged, calibration)
    runs |= others
    exact = [runs[FLOAT32](inputs) for inputs in held_out]
    quantized = [name for name in runs if name in (OURS, UNCALIBRATED) or "int8" in name]
    sqnr = {
        name: mean_sqnr(exact, [run(inputs) for inputs in held_out])
        for name, run in runs.items()
        if name in quantized
    }
    milliseconds, ratios = contest_on_one_thread(runs, held_out[0], turns)
    return {
        "file": packaged.name,
        "package": packaged.package,
        "member": packaged.member,
        "compile_seconds": compile_seconds,
        "sqnr_db": sqnr,
        "milliseconds": milliseconds,
        "times as fast as": ratios,
        "failed": failed,
    }


def peers(packaged, calibration: list[Inputs]) -> tuple[dict[str, Run], dict[str, str]]:
    """Runners of the peers that take the file, and what the others said."""
    import nncf
    import onnx
    import openvino

    from zoo.peers import session

    declared = {value.name for value in onnx.load(packaged.path(), load_external_data=False).graph.input}
    fixed = {name: np.array(value) for name, value in packaged.params.items() if name in declared}
    one_thread = {"INFERENCE_NUM_THREADS": 1}
    in_float32 = one_thread | {"INFERENCE_PRECISION_HINT": "f32"}
    core = openvino.Core()

    def read():
        model = core.read_model(packaged.path())
        model.reshape({name: list(array.shape) for name, array in (fixed | dict(calibration[0])).items()})
        return model

    def run_openvino(compiled, inputs: Inputs) -> list[np.ndarray]:
        found = compiled(fixed | dict(inputs))
        return [np.array(found[output]) for output in compiled.outputs]

    def unquantized(options: dict[str, Any]) -> Run:
        return functools.partial(run_openvino, core.compile_model(read(), "CPU", options))

    def int8() -> Run:
        nncf.set_log_level(logging.ERROR)
        samples = [fixed | dict(sample) for sample in calibration]
        quantized = nncf.quantize(
            read(),
            nncf.Dataset(samples),
            subset_size=len(samples),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER if packaged.has_attention else None,
        )
        return functools.partial(run_openvino, core.compile_model(quantized, "CPU", in_float32))

    plain = session(packaged.path())
    runs: dict[str, Run] = {FLOAT32: lambda inputs: plain(fixed | dict(inputs))}
    failed = {}
    others: dict[str, Callable[[], Run]] = {
        "OpenVINO float32": functools.partial(unquantized, in_float32),
        "OpenVINO default": functools.partial(unquantized, one_thread),
        "OpenVINO int8 (NNCF)": int8,
    }
    for name, make in others.items():
        try:
            run = make()
            run(calibration[0])
            runs[name] = run
        except Exception as error:  # of many kinds
            failed[name] = str(error).strip().splitlines()[0][:200]
    return runs, failed


def mean_sqnr(exact: Sequence[Sequence[np.ndarray]], found: Sequence[Sequence[np.ndarray]]) -> float:
    """In decibels, of each floating-point output on all inputs; their mean."""
    from zoo.task import sqnr_db

    decibels = []
    for outputs in zip(zip(*exact, strict=True), zip(*found, strict=True), strict=True):
        expected, got = (np.concatenate([np.reshape(array, -1) for array in arrays]) for arrays in outputs)
        if expected.dtype.kind == "f":
            decibels.append(sqnr_db(expected, got))
    return float(np.mean(decibels))


if __name__ == "__main__":
    main()
