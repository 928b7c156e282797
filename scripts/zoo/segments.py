"""Tables of any number of segments, in registers as the compiler has them and gathered from memory, for timing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.code_generation import generate_code
from tvm_qfp8.tables import Table, build_table
from tvm_qfp8.tables.cells import fit_cells, place
from tvm_qfp8.tables.evaluate import evaluate
from tvm_qfp8.tables.families import find_function
from tvm_qfp8.tables.polynomial import MAGIC
from tvm_qfp8.tables.reduction import reduced_curve
from tvm_qfp8.tables.search import as_tuples
from tvm_qfp8.targets import cpu_features, isa, parse_target
from tvm_qfp8.topi.interpolate import TirOps, emit_table
from tvm_qfp8.topi.isa import InstructionSet, instruction_set
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, load, store

TARGET = "x86-64-v3"
"""Eight lanes and ``vpermps``: one permutation finds 8 coefficients."""
TAIL = 1e-5
REGISTER_SEGMENTS = {8: (2, 3, 4, 5, 6, 7, 8), 16: (10, 12, 14, 16), 32: (20, 24, 28, 32)}
GATHER_SEGMENTS = (16, 64, 256, 1024)
DEGREES = (1, 2)
SAME_ERROR = {"gelu": (1e-3, 1e-4, 1e-5), "mish": (1e-3, 1e-4, 1e-5)}


@dataclass(frozen=True)
class Entry:
    """One contestant: a table, how its coefficients are found, how many of its cells are in use."""

    form: str
    table: Table
    segments: int

    @property
    def name(self) -> str:
        return f"{self.table.name} {self.form}, degree {self.table.degree}, {self.segments} segments"


def fitted(name: str, segments: int, degree: int, cells: int, max_error: float | None = None) -> Table | None:
    """A table of exactly ``segments`` cells, padded to ``cells``; None where it misses ``max_error``."""
    function = find_function(name)
    curve, hinge = reduced_curve(function, TAIL if max_error is None else 0.5 * max_error)
    placement = place(replace(curve, high_free=False), segments, exact_scale=False)
    assert placement is not None
    found = fit_cells(curve, placement, degree, False, np.inf if max_error is None else 0.9 * max_error)
    if found is None:
        return None
    coefficients, bound = found
    # Cell n stands at n modulo the number of cells. What fills the rest is never read, but neither zeros nor a
    # repetition of the rest: of those LLVM would leave whole look-ups out.
    padded = np.stack([np.resize(power[::-1], cells) for power in coefficients])
    for n, *_ in placement.intervals():
        padded[:, n % cells] = coefficients[:, n % segments]
    return Table(
        name,
        function.reduction,
        bound,
        0.0,
        False,
        as_tuples(padded),
        placement.scale,
        placement.offset,
        placement.low,
        placement.high,
        MAGIC * placement.step,
        hinge=hinge,
    )


def sweep() -> Iterator[Entry]:
    """GELU with ever more segments in every form."""
    for degree in DEGREES:
        for cells, counts in REGISTER_SEGMENTS.items():
            for segments in counts:
                table = fitted("gelu", segments, degree, cells)
                if table is not None:
                    yield Entry(f"registers of {cells}", table, segments)
        for segments in GATHER_SEGMENTS:
            table = fitted("gelu", segments, degree, segments)
            if table is not None:
                yield Entry("gather", table, segments)


def same_error() -> Iterator[Entry]:
    """What the compiler takes at an error, and the smallest gathered table of each degree that reaches it."""
    for name, max_errors in SAME_ERROR.items():
        for max_error in max_errors:
            table = build_table(name, max_error)
            yield Entry(f"compiler's at {max_error:g}", table, table.cells)
            for degree in DEGREES:
                segments = 32
                while segments <= 4096:
                    gathered = fitted(name, segments, degree, segments, max_error)
                    if gathered is not None:
                        yield Entry(f"gather at {max_error:g}", gathered, segments)
                        break
                    segments *= 2


class GatherOps(TirOps):
    """The operations of a kernel, with coefficients gathered from ``memory``, ``(powers, cells)`` in a row."""

    def __init__(self, isa: InstructionSet, memory) -> None:
        super().__init__(8, isa)
        self.memory = memory

    def lookup(self, coefficients, index):
        cells = len(coefficients[0])
        cell = T.bind(index & tirx.const(cells - 1, "int32x8"))
        mask = tirx.reinterpret("float32x8", tirx.Broadcast(tirx.const(-1, "int32"), 8))
        return [
            T.bind(
                tirx.call_llvm_intrin(
                    "float32x8",
                    "llvm.x86.avx2.gather.d.ps.256",
                    tirx.Broadcast(tirx.const(0.0, "float32"), 8),
                    self.memory.access_ptr("r", offset=power * cells),
                    cell,
                    mask,
                    tirx.const(4, "int8"),
                )
            )
            for power in range(len(coefficients))
        ]


def kernel(entry: Entry, size: int) -> Callable[[np.ndarray, Any], Callable[[], object]]:
    """``make(x)`` gives a runner without arguments."""
    target = parse_target(TARGET)
    instructions = instruction_set(isa(target), cpu_features(target))
    gathers, lanes = entry.form.startswith("gather"), instructions.lanes

    def body(source, memory, result) -> None:
        with T.serial(0, size // lanes) as i:
            x = T.bind(load(source, i * lanes, lanes))
            if gathers:
                y = evaluate(entry.table, x, GatherOps(instructions, memory))
            else:
                y = emit_table(entry.table, x, instructions)
            store(result, i * lanes, y, lanes)

    values = np.array(entry.table.coefficients, np.float32).ravel()
    specs = [TensorSpec((n,), "float32") for n in (size, values.size, size)]
    function = generate_code(tvm.IRModule({"main": build_prim_func("main", specs, body)}), target).mod["main"]
    memory = tvm.runtime.tensor(values)

    def make(x: np.ndarray, y: Any) -> Callable[[], object]:
        source = tvm.runtime.tensor(x)

        def run() -> object:
            function(source, memory, y)
            return y

        return run

    return make
