"""What is tuned: one linear kernel of one shape, for one instruction set and number of threads.

A workload does not know the model it came from, so models with equal layers share their records. It is measured as
the kernel that ``compile`` writes for the layer alone: codes in, scale and bias, codes out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.format import Layout, get_layout
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.lower_groups import LowerGroups
from tvm_qfp8.relay_passes.quantize_linear import codes_constant
from tvm_qfp8.topi.batch_matmul import BatchMatmulShape
from tvm_qfp8.topi.conv2d import ConvShape
from tvm_qfp8.topi.gemm import GemmShape
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.schedules import (
    REVISION,
    SHARING,
    BatchMatmulSchedule,
    ConvSchedule,
    Decisions,
    DepthwiseSchedule,
    GemmSchedule,
    Space,
)

FAMILIES: dict[str, tuple[Any, Any]] = {
    "gemm": (GemmSchedule, GemmShape),
    "conv2d": (ConvSchedule, ConvShape),
    "depthwise": (DepthwiseSchedule, ConvShape),
    "batch_matmul": (BatchMatmulSchedule, BatchMatmulShape),
}
"""Name of each kernel family, its schedule and its shape."""

ATTRIBUTE = "qfp8.workload"
BLOCK = "kernel"


@dataclass(frozen=True)
class Workload:
    """One kernel: ``family`` is a key of ``FAMILIES``."""

    family: str
    shape: Any
    isa: InstructionSet
    threads: int

    @classmethod
    def of(cls, schedule: Any, isa: InstructionSet, shape: Any, threads: int) -> Workload:
        """From the arguments of a ``ScheduleChooser``."""
        return cls(next(name for name, pair in FAMILIES.items() if pair[0] is schedule), shape, isa, threads)

    @property
    def schedules(self) -> Any:
        """The family's class of schedules."""
        return FAMILIES[self.family][0]

    def space(self) -> Space:
        return self.schedules.space(self.isa, self.shape, self.threads)

    def default(self) -> Decisions:
        return self.schedules.default(self.isa, self.shape, self.threads).decisions()

    def allows(self, decisions: Mapping[str, int]) -> bool:
        """Whether all decisions are known and among the candidates; one thread shares its work in either way."""
        space: dict[str, tuple[int, ...]] = self.space()
        if self.threads == 1:
            space |= {name: (0, 1) for name in SHARING if name in space}
        return decisions.keys() == space.keys() and all(decisions[name] in space[name] for name in space)

    @property
    def key(self) -> str:
        """JSON text that tells workloads; it is stored in the logs."""
        shape = {f.name: _plain(getattr(self.shape, f.name)) for f in dataclasses.fields(self.shape)}
        return json.dumps(
            {
                "family": self.family,
                "shape": shape,
                "isa": self.isa.label,
                "threads": self.threads,
                "revision": REVISION,
            }
        )

    @property
    def macs(self) -> int:
        """Multiply-adds of one call."""
        shape = self.shape
        if isinstance(shape, ConvShape):
            pixels = shape.batch * shape.out_height * shape.out_width
            return pixels * shape.out_channels * shape.channels // shape.groups * int(np.prod(shape.kernel))
        return getattr(shape, "batch", 1) * shape.rows * shape.columns * shape.depth

    def __str__(self) -> str:
        shape, threads = self.shape, f", {self.threads} threads" if self.threads > 1 else ""
        if isinstance(shape, ConvShape):
            size = f"{shape.height}x{shape.width}x{shape.channels}"
            kernel = "x".join(map(str, shape.kernel))
            stride = f" stride {shape.stride[0]}" if shape.stride != (1, 1) else ""
            return f"{self.family} {size} -> {shape.out_channels}, {kernel}{stride}{threads}"
        batch = f"{shape.batch} x " if hasattr(shape, "batch") else ""
        return f"{self.family} {batch}{shape.rows} x {shape.depth} x {shape.columns}{threads}"


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Layout) else value


def parse_shape(family: str, fields: Mapping[str, Any]) -> Any:
    """The shape that a workload's key describes.

    Raises
    ------
    KeyError, TypeError
        The fields are not those of the family's shape.
    """

    def restore(value: Any) -> Any:
        if isinstance(value, str):
            return get_layout(value)
        return tuple(value) if isinstance(value, list) else value

    return FAMILIES[family][1](**{name: restore(value) for name, value in fields.items()})


def template(workload: Workload) -> tvm.IRModule:
    """The workload as MetaSchedule sees it: a PrimFunc that names the kernel, with a block to hold the decisions."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"tirx.noalias": True, ATTRIBUTE: workload.key})
            done = T.arg("done", T.buffer((1,), "int32"))
            with T.sblock(BLOCK):
                T.reads()
                T.writes(done[0:1])
                T.buffer_store(done, tirx.const(0, "int32"), [0])
    return tvm.IRModule({"main": builder.get()})


def quantized_layer(workload: Workload) -> tvm.IRModule:
    """A Relax program of the one layer, with all weights 0."""
    shape = workload.shape
    builder = relax.BlockBuilder()
    if workload.family == "gemm":
        inputs: list = [((shape.rows, shape.depth), shape.activation)]
    elif workload.family == "batch_matmul":
        y = (shape.columns, shape.depth) if shape.transpose_y else (shape.depth, shape.columns)
        inputs = [((shape.batch, shape.rows, shape.depth), shape.x), ((shape.batch, *y), shape.y)]
    else:
        inputs = [((shape.batch, shape.height, shape.width, shape.channels), shape.activation)]
    variables: list = [
        relax.Var(f"x{i}", relax.TensorType(extents, layout.ir_dtype))
        for i, (extents, layout) in enumerate(inputs)
    ]
    with builder.function("main", variables):
        with builder.dataflow():
            y = builder.emit(_layer(workload, variables))
            output = builder.emit_output(qfp8_ops.encode(y, get_layout("UE2M6"), 1.0))
        builder.emit_func_output(output)
    return builder.get()


def _layer(workload: Workload, inputs: list) -> relax.Call:
    shape = workload.shape
    if workload.family == "batch_matmul":
        return qfp8_ops.batch_matmul(inputs[0], inputs[1], 1.0, transpose_y=shape.transpose_y)
    columns = shape.columns if workload.family == "gemm" else shape.out_channels
    ones = relax.const(np.ones(columns, np.float32))
    if workload.family == "gemm":
        codes = np.zeros((columns, shape.depth), np.uint8)
        return qfp8_ops.matmul(inputs[0], codes_constant(codes, shape.weight.name), ones, ones)
    codes = np.zeros((columns, *shape.kernel, shape.channels // shape.groups), np.uint8)
    return qfp8_ops.conv2d(
        inputs[0],
        codes_constant(codes, shape.weight.name),
        ones,
        ones,
        strides=shape.stride,
        padding=shape.padding,
        dilation=shape.dilation,
        groups=shape.groups,
        input_dilation=shape.input_dilation,
    )


def kernel(workload: Workload, layer: tvm.IRModule, decisions: Decisions) -> tvm.IRModule:
    """The layer's kernel with a schedule, as function ``main`` of a module of its own."""
    schedule = workload.schedules.from_decisions(decisions)
    lower: Any = LowerGroups(workload.isa, workload.threads, choose=lambda *_: schedule)
    lowered = lower(layer)
    functions = [f for _, f in lowered.functions_items() if isinstance(f, tirx.PrimFunc)]
    assert len(functions) == 1, f"{workload} is written as {len(functions)} kernels"
    return tvm.IRModule({"main": functions[0].with_attr("global_symbol", "main")})
