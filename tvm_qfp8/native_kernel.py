"""Kernels that this package runs itself, on the machine that it runs on."""

from __future__ import annotations

from collections.abc import Callable

import tvm

from tvm_qfp8.code_generation import generate_code
from tvm_qfp8.targets import cpu_features, isa, parse_target
from tvm_qfp8.topi.isa import InstructionSet, instruction_set


def compile_native(emit: Callable[[InstructionSet], tvm.tirx.PrimFunc]) -> Callable:
    """The kernel ``emit(instruction set)``, compiled for this machine."""
    target = parse_target("native")
    kernel = emit(instruction_set(isa(target), cpu_features(target)))
    return generate_code(tvm.IRModule({"main": kernel}), target).mod["main"]
