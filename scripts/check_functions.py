"""Checks tables over all 2**32 float32 inputs on this machine, a minute or so a function.

For every named function: the kernel's error against the function in float64 stays within the proved bound; the
kernel for AVX2 gives the same bits, on a part of the inputs plain SSE2's and the NumPy twin too; NaN gives NaN.

Inputs are taken in blocks of 2**20 neighbouring bit patterns, an eighth of a binade. There a smooth function is a
polynomial of low degree to twelve digits, which the kernel that measures the error evaluates in float64. The polynomial
is compared with the function at other points of the block; where they differ (a kink, or an angle that goes round many
times) the function itself is evaluated at every input. ``--stride N`` takes every Nth block only. Functions that the
output file has from the same machine and conditions stay in it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.code_generation import generate_code
from tvm_qfp8.tables import FUNCTIONS, Table, build_table
from tvm_qfp8.tables.derivatives import DERIVATIVES
from tvm_qfp8.tables.families import find_function
from tvm_qfp8.tables.observe import errors
from tvm_qfp8.targets import cpu_features, isa, parse_target
from tvm_qfp8.topi.interpolate import emit_table
from tvm_qfp8.topi.isa import InstructionSet, instruction_set
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, load, store
from zoo.machine import describe_machine

REPOSITORY = Path(__file__).resolve().parent.parent
BLOCK = 1 << 20
BLOCKS = 2**32 // BLOCK
NAMES = (
    *(*FUNCTIONS, "elu(0.5)", "celu(1.3)", "pow(1.7)"),
    *(*DERIVATIVES, "elu'", "elu(0.5)'", "selu'", "celu(1.3)'"),
)
TWIN_STRIDE = 61
"""The slow twins are compared on every so manieth block."""

DEGREE = 14
PROBES = 96
FLOAT32 = np.finfo(np.float32)
SMOOTH = 1e-10
"""The polynomial may differ so much from the function, measured as the error is; it is added to what is observed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
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
    if arguments.output.exists():
        earlier = json.loads(arguments.output.read_text())
        if all(earlier[key] == record[key] for key in record if key != "functions"):
            record["functions"] = earlier["functions"]
    for name in arguments.functions.split(","):
        table = build_table(name, max_error=arguments.max_error)
        started = time.perf_counter()
        found = Check(table, arguments.target).run(arguments.stride)
        found["seconds"] = round(time.perf_counter() - started, 1)
        record["functions"][name] = found
        print(name, json.dumps(found), flush=True)
        arguments.output.parent.mkdir(exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    if not all(found["good"] for found in record["functions"].values()):
        raise SystemExit("error: a table breaks its bound or differs from its twin, see above")


def _instructions(target: str) -> tuple[tvm.target.Target, InstructionSet]:
    parsed = parse_target(target)
    return parsed, instruction_set(isa(parsed), cpu_features(parsed))


def _compile(target: str, specs: list[TensorSpec], body: Callable) -> Callable:
    parsed, _ = _instructions(target)
    module = generate_code(tvm.IRModule({"main": build_prim_func("main", specs, body)}), parsed)
    return module.mod["main"]


def plain(table: Table, target: str) -> Callable:
    """``kernel(x, y)``: the table on a block."""
    _, instructions = _instructions(target)
    lanes = instructions.lanes

    def body(source, result) -> None:
        with T.serial(0, BLOCK // lanes) as i:
            store(result, i * lanes, emit_table(table, load(source, i * lanes, lanes), instructions), lanes)

    return _compile(target, [TensorSpec((BLOCK,), "float32")] * 2, body)


def measuring(table: Table, target: str) -> Callable:
    """``kernel(x, polynomial, y, worst)``: the table on a block, and the greatest error in each lane.

    ``polynomial`` is the centre, the reciprocal of half the width, and coefficients from the highest power down.
    """
    _, instructions = _instructions(target)
    lanes = instructions.lanes
    double = f"float64x{lanes}" if lanes > 1 else "float64"

    def body(source, polynomial, result, worst) -> None:
        store(worst, 0, tirx.const(0.0, double), lanes)

        def number(index: int):
            value = load(polynomial, index, 1)
            return tirx.Broadcast(value, lanes) if lanes > 1 else value

        with T.serial(0, BLOCK // lanes) as i:
            x = T.bind(load(source, i * lanes, lanes))
            y = T.bind(emit_table(table, x, instructions))
            store(result, i * lanes, y, lanes)
            t = T.bind((x.astype(double) - number(0)) * number(1))
            value = number(2)
            for power in range(1, DEGREE + 1):
                value = T.bind(value * t + number(2 + power))
            size = T.bind(tirx.abs(value))
            size = size if table.relative else tirx.max(size, tirx.const(1.0, double))
            error = T.bind(tirx.abs(y.astype(double) - value) / size)
            store(worst, 0, tirx.max(load(worst, 0, lanes), error), lanes)

    block = TensorSpec((BLOCK,), "float32")
    specs = [block, TensorSpec((DEGREE + 3,), "float64"), block, TensorSpec((lanes,), "float64")]
    return _compile(target, specs, body)


class Check:
    """One function's table and the kernels that check it."""

    def __init__(self, table: Table, target: str) -> None:
        self.table = table
        self.reference = find_function(table.name).reference
        _, instructions = _instructions(target)
        self.measure = measuring(table, target)
        self.avx2, self.sse2 = plain(table, "x86-64-v3"), plain(table, "x86-64")
        self.y = tvm.runtime.tensor(np.zeros(BLOCK, np.float32))
        self.other = tvm.runtime.tensor(np.zeros(BLOCK, np.float32))
        self.worst = tvm.runtime.tensor(np.zeros(instructions.lanes))
        self.nodes = np.cos(np.pi * (np.arange(DEGREE + 1) + 0.5) / (DEGREE + 1))
        self.probes = np.linspace(-1.0, 1.0, PROBES)

    def run(self, stride: int) -> dict[str, Any]:
        """What differs and the largest error."""
        different = wrong_nan = direct = 0
        observed, near = 0.0, 0.0
        for block in range(0, BLOCKS, stride):
            x = (np.arange(BLOCK, dtype=np.uint32) + np.uint32(block * BLOCK)).view(np.float32)
            polynomial, gap = self._polynomial(x)
            source = tvm.runtime.tensor(x)
            self.measure(source, tvm.runtime.tensor(polynomial), self.y, self.worst)
            self.avx2(source, self.other)
            y = self.y.numpy()
            different += _different(y, self.other.numpy())
            if block // stride % TWIN_STRIDE == 0:
                self.sse2(source, self.other)
                different += _different(y, self.other.numpy()) + _different(y, self.table(x))
            if gap <= SMOOTH:
                error = np.inf if np.isnan(y).any() else float(self.worst.numpy().max()) + gap
            else:
                direct += 1
                nan = np.isnan(x)
                wrong_nan += int((~np.isnan(y[nan])).sum())
                error = self._direct(x[~nan], y[~nan])
            if error > observed:
                observed, near = error, float(x[0])
        good = not different and not wrong_nan and observed <= self.table.max_error
        return {
            "good": good,
            "proved": self.table.max_error,
            "observed": observed,
            "near": near,
            "differ from twins": different,
            "NaN lost": wrong_nan,
            "blocks evaluated directly": direct,
            "cells": self.table.cells,
            "degree": self.table.degree,
        }

    def _direct(self, x: np.ndarray, y: np.ndarray) -> float:
        if not x.size:
            return 0.0
        with np.errstate(all="ignore"):
            return float(errors(y, self.reference(x.astype(np.float64)), self.table.relative).max())

    def _polynomial(self, x: np.ndarray) -> tuple[np.ndarray, float]:
        """The block's polynomial, and how far from the function it is at points between its nodes."""
        with np.errstate(all="ignore"):
            ends = x[[0, -1]].astype(np.float64)
            centre, half = ends.mean(), (ends[1] - ends[0]) / 2
            values = np.asarray(self.reference(centre + half * self.nodes), np.float64)
            if not (np.isfinite(ends).all() and half and np.isfinite(values).all()):
                return np.zeros(DEGREE + 3), np.inf
            chebyshev = np.polynomial.chebyshev.chebfit(self.nodes, values, DEGREE)
            powers = np.polynomial.chebyshev.cheb2poly(chebyshev)
            powers = np.pad(powers, (0, DEGREE + 1 - len(powers)))
            expected = np.asarray(self.reference(centre + half * self.probes), np.float64)
            size = np.abs(expected) if self.table.relative else np.maximum(np.abs(expected), 1.0)
            if size.max() > FLOAT32.max or (self.table.relative and size.min() < FLOAT32.tiny):
                return np.zeros(DEGREE + 3), np.inf
            gap = float(
                (np.abs(np.polynomial.polynomial.polyval(self.probes, powers) - expected) / size).max()
            )
        return np.array([centre, 1.0 / half, *powers[::-1]]), gap if np.isfinite(gap) else np.inf


def _different(a: np.ndarray, b: np.ndarray) -> int:
    """Values whose bits differ, NaN apart."""
    unequal = a.view(np.uint32) != b.view(np.uint32)
    return int((unequal & ~(np.isnan(a) & np.isnan(b))).sum()) if unequal.any() else 0


if __name__ == "__main__":
    main()
