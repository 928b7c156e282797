"""The cases as programs of this package: 8-bit codes in, 8-bit codes out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tvm
from tvm import relax

import tvm_qfp8
from kernel_bench.cases import Case, Convolution, Dense
from tvm_qfp8.code_generation import generate_code
from tvm_qfp8.format import get_layout
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.lower_groups import LowerGroups
from tvm_qfp8.relay_passes.quantize_linear import codes_constant
from tvm_qfp8.targets import cpu_features, isa, parse_target
from tvm_qfp8.topi.isa import instruction_set
from tvm_qfp8.topi.schedules import ScheduleChooser, default_schedule
from tvm_qfp8.topi.static_memory import StaticMemory
from tvm_qfp8.tuning.logs import LoggedSchedules, default_roots

LAYOUTS = {Dense: ("E2M5", "E2M5"), Convolution: ("UE2M6", "E2M5")}
"""Of activations and weights, as calibration picks them most often: rows of tokens have a scale each, convolutions
follow a ReLU."""

LINEAR_LAYOUTS = {Dense: ("E1M6", "E1M6"), Convolution: ("UE1M7", "E1M6")}
"""Where they cost the outputs little: products of bytes."""

Run = Callable[[], object]


def runner(
    case: Case,
    choose: ScheduleChooser = default_schedule,
    winograd: bool = True,
    target: str = "native",
    layouts: dict[type, tuple[str, str]] = LAYOUTS,
) -> Run:
    """The compiled case on random codes; a call leaves its result inside the virtual machine."""
    memory = StaticMemory() if winograd else None
    activations, weights = layouts[type(case)]
    compiled = executable(case, target, activations, choose, memory, weights)
    codes = np.random.default_rng(0).integers(0, 127, input_shape(case), dtype=np.uint8)
    return _on_machine(compiled, codes)


def input_shape(case: Case) -> tuple[int, ...]:
    """Of the codes that enter the case."""
    return (case.rows, case.depth) if isinstance(case, Dense) else (1, case.size, case.size, case.channels)


def executable(
    case: Case,
    target: str,
    activations: str,
    choose: ScheduleChooser = default_schedule,
    memory: StaticMemory | None = None,
    weights: str = "E2M5",
):
    """The case compiled for a target, activations and weights as codes of these layouts."""
    rng = np.random.default_rng(0)
    layout = get_layout(activations)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(input_shape(case), layout.ir_dtype))
    with builder.function("main", [x]):
        with builder.dataflow():
            value: relax.Expr = x
            for index in range(case.layers):
                value = builder.emit(_layer(case, index, value, weights, rng))
                if isinstance(case, Convolution):
                    value = builder.emit(relax.op.nn.relu(value))
                value = builder.emit(qfp8_ops.encode(value, layout, 0.05))
            output = builder.emit_output(value)
        builder.emit_func_output(output)
    return _compile(builder.get(), target, choose, memory)


def _layer(case: Case, index: int, x: relax.Expr, layout: str, rng: np.random.Generator) -> relax.Expr:
    if isinstance(case, Dense):
        shape: tuple[int, ...] = (case.columns, case.depth)
    else:
        channels, outputs = case.layer_channels(index)
        shape = (outputs, case.kernel, case.kernel, channels // case.groups)
    weight = tvm_qfp8.quantize(
        rng.standard_normal(shape).astype(np.float32), axis=0, layout=layout, bias="max"
    ).codes
    a = relax.const(np.full(shape[0], 1e-4, np.float32))
    bias = relax.const(np.zeros(shape[0], np.float32))
    constant = codes_constant(weight, layout)
    if isinstance(case, Dense):
        return qfp8_ops.matmul(x, constant, a, bias)
    return qfp8_ops.conv2d(
        x,
        constant,
        a,
        bias,
        strides=(case.stride, case.stride),
        padding=(case.padding,) * 4,
        dilation=(case.dilation, case.dilation),
        groups=case.groups,
    )


def tuned_schedules() -> LoggedSchedules:
    """What the tuning logs of this machine hold, as ``compile`` reads them."""
    return LoggedSchedules(parse_target("native"), default_roots())


def _compile(mod: tvm.IRModule, name: str, choose: ScheduleChooser, memory: StaticMemory | None):
    target = parse_target(name)
    with target:
        instructions = instruction_set(isa(target), cpu_features(target))
        mod = LowerGroups(instructions, 1, choose=choose, memory=memory)(mod)
        return generate_code(mod, target)


def _on_machine(executable, x: np.ndarray) -> Run:
    machine = relax.VirtualMachine(executable, tvm.cpu())
    machine.set_input("main", tvm.runtime.tensor(x))
    return lambda: machine.invoke_stateful("main")


def empty_runner() -> Run:
    """Next to nothing to do: what a call costs."""
    layout = get_layout("E2M5")
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((16,), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            output = builder.emit_output(qfp8_ops.encode(x, layout, 1.0))
        builder.emit_func_output(output)
    return _on_machine(_compile(builder.get(), "native", default_schedule, None), np.ones(16, np.float32))
