"""Checks tables over all 2**32 float32 inputs on this machine: equal to the NumPy twin, within the proved bound.

Also that NaN gives NaN. A reference in float64 is computed for every finite input of a function. Some minutes a
function; ``--stride N`` takes every Nth block of 2**20 neighbouring bit patterns only.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.tables import FUNCTIONS, Table, build_table
from tvm_qfp8.tables.derivatives import DERIVATIVES
from tvm_qfp8.tables.families import find_function
from tvm_qfp8.tables.observe import errors
from tvm_qfp8.targets import cpu_features, isa, parse_target
from tvm_qfp8.topi.interpolate import emit_table
from tvm_qfp8.topi.isa import instruction_set
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, load, store
from zoo.machine import describe_machine

REPOSITORY = Path(__file__).resolve().parent.parent
BLOCK = 1 << 20
BLOCKS = 2**32 // BLOCK
NAMES = (
    *(*FUNCTIONS, "elu(0.5)", "celu(1.3)", "pow(1.7)"),
    *(*DERIVATIVES, "elu'", "elu(0.5)'", "selu'", "celu(1.3)'"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--functions", default=",".join(NAMES))
    parser.add_argument("--max-error", type=float, default=1e-3)
    parser.add_argument("--target", default="native")
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "results" / "check_functions.json")
    arguments = parser.parse_args()
    record: dict[str, Any] = {
        "machine": describe_machine(),
        "target": arguments.target,
        "max_error": arguments.max_error,
        "inputs": len(range(0, BLOCKS, arguments.stride)) * BLOCK,
        "functions": {},
    }
    for name in arguments.functions.split(","):
        table = build_table(name, max_error=arguments.max_error)
        started = time.perf_counter()
        found = check(table, compiled(table, arguments.target), arguments.stride)
        found["seconds"] = round(time.perf_counter() - started, 1)
        record["functions"][name] = found
        print(name, json.dumps(found), flush=True)
        arguments.output.parent.mkdir(exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    if not all(found["good"] for found in record["functions"].values()):
        raise SystemExit("error: a table breaks its bound or differs from its twin, see above")


def compiled(table: Table, target: str):
    """``run(x)`` of one block in the kernel of a target."""
    parsed = parse_target(target)
    instructions = instruction_set(isa(parsed), cpu_features(parsed))
    lanes = instructions.lanes

    def body(source, result) -> None:
        with T.serial(0, BLOCK // lanes) as i:
            store(result, i * lanes, emit_table(table, load(source, i * lanes, lanes), instructions), lanes)

    function = build_prim_func("main", [TensorSpec((BLOCK,), "float32")] * 2, body)
    module = tvm.compile(tvm.IRModule({"main": function}), target=parsed)
    y = tvm.runtime.tensor(np.zeros(BLOCK, np.float32))

    def run(x: np.ndarray) -> np.ndarray:
        module.mod["main"](tvm.runtime.tensor(x), y)
        return y.numpy()

    return run


def check(table: Table, run, stride: int) -> dict[str, Any]:
    """What differs and the largest error."""
    reference = find_function(table.name).reference
    different = wrong_nan = 0
    worst, worst_at = 0.0, 0.0
    for block in range(0, BLOCKS, stride):
        x = (np.arange(BLOCK, dtype=np.uint32) + np.uint32(block * BLOCK)).view(np.float32)
        y, twin = run(x), table(x)
        different += int(
            ((y.view(np.uint32) != twin.view(np.uint32)) & ~(np.isnan(y) & np.isnan(twin))).sum()
        )
        nan = np.isnan(x)
        if nan.any():
            wrong_nan += int((~np.isnan(y[nan])).sum())
            x, y = x[~nan], y[~nan]
        if not x.size:
            continue
        with np.errstate(all="ignore"):
            error = errors(y, reference(x.astype(np.float64)), table.relative)
        at = int(error.argmax())
        if error[at] > worst:
            worst, worst_at = float(error[at]), float(x[at])
    good = not different and not wrong_nan and worst <= table.max_error
    return {
        "good": good,
        "proved": table.max_error,
        "observed": worst,
        "at": worst_at,
        "differ from twin": different,
        "NaN lost": wrong_nan,
        "cells": table.cells,
        "degree": table.degree,
    }


if __name__ == "__main__":
    main()
