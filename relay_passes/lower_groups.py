"""Writes one kernel per group and the program that calls them.

Before (quantized Relax, one function)::

    lv = R.qfp8.encode(x, layout="E3M4", scale=...)
    lv1 = R.qfp8.matmul(lv, w, a, bias)
    lv2 = R.qfp8.interpolate(lv1, function="gelu", max_error=...)
    lv3 = R.qfp8.encode(lv2, ...)

After: QFP8 tensors are uint8, weights are packed for the instruction set, every group is one scheduled PrimFunc::

    lv = R.call_tir(cls.encode, (x, ...), out=R.Tensor(..., "uint8"))
    lv3 = R.call_tir(cls.matmul_interpolate_encode, (lv, w_panels, a, bias, ...), out=R.Tensor(..., "uint8"))

Equal kernels are written once. Operators that belong to no group stay for ``LegalizeOps`` and
``schedule_rest``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tvm
from tvm import relax

from tvm_qfp8.format import Layout, get_layout
from tvm_qfp8.relay_passes import cuda_kernels
from tvm_qfp8.relay_passes.encoded_rows import with_encoded_rows
from tvm_qfp8.relay_passes.fuse import (
    Group,
    Single,
    joins_channels,
    op_name,
    partition,
    parts_of,
    results_of,
    shape_of,
    static_shape,
)
from tvm_qfp8.relay_passes.kernels import Kernel, write_kernel
from tvm_qfp8.relay_passes.operands import array_of, storage_dtype
from tvm_qfp8.relay_passes.recurrent_kernels import recurrent_kernel
from tvm_qfp8.relay_passes.rewriter import MainRewriter
from tvm_qfp8.topi.code_lookup import look_up_prim_func
from tvm_qfp8.topi.concat import concat_prim_func
from tvm_qfp8.topi.encode_rows import encode_rows_prim_func, inverse_of
from tvm_qfp8.topi.encode_samples import encode_samples_prim_func
from tvm_qfp8.topi.float_contract import BFLOAT16_WORDS
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.pad import MODES, pad_prim_func, places
from tvm_qfp8.topi.prim_func import TensorSpec
from tvm_qfp8.topi.resize import COORDINATES, ResizeShape, resize_prim_func
from tvm_qfp8.topi.schedules import ScheduleChooser, default_schedule
from tvm_qfp8.topi.static_memory import FUNCTION, StaticMemory


@tvm.transform.module_pass(opt_level=0, name="LowerGroups")
class LowerGroups:
    """Write the kernels of a quantized module for one instruction set."""

    def __init__(
        self,
        isa: InstructionSet,
        threads: int,
        max_error: float = 1e-3,
        choose: ScheduleChooser = default_schedule,
        memory: StaticMemory | None = None,
    ) -> None:
        self.isa, self.threads, self.max_error = isa, threads, max_error
        self.choose, self.memory = choose, memory

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        # What nobody reads any more must not make its argument a result of a kernel.
        mod = _Rewriter(relax.transform.DeadCodeElimination()(mod), self).rewrite()
        if self.memory is not None and self.memory.fillers:
            mod[FUNCTION] = self.memory.function()
        return mod


def _is_plain_concat(step: Single) -> bool:
    """A concatenation of static tensors whose elements have whole bytes."""
    whole_bytes = str(getattr(step.var.ty, "dtype", "bool")) != "bool"
    return op_name(step.value) == "relax.concat" and static_shape(step.var) is not None and whole_bytes


def _linear_resize(value: relax.Expr) -> ResizeShape | None:
    """The static description of a linear resizing of float32 images; None for any other operator."""
    if op_name(value) != "relax.image.resize2d" or str(value.attrs.method) != "linear":
        return None
    x, y = static_shape(value.args[0]), static_shape(value)
    coordinates, layout = str(value.attrs.coordinate_transformation_mode), str(value.attrs.layout)
    dtypes = {str(value.ty.dtype), str(value.args[0].ty.dtype)}
    if x is None or y is None or 0 in (*x, *y) or dtypes != {"float32"} or coordinates not in COORDINATES:
        return None
    if layout == "NHWC":
        return ResizeShape(x[0], x[1], x[2], x[3], (y[1], y[2]), coordinates)
    if layout == "NCHW":
        return ResizeShape(x[0] * x[1], x[2], x[3], 1, (y[2], y[3]), coordinates)
    return None


def _padded_pixels(value: relax.Expr) -> tuple[int, int, int, int] | None:
    """Top, left, bottom and right of what pads images in NHWC by their own pixels; None for any other operator."""
    if op_name(value) != "relax.nn.pad" or str(value.attrs.pad_mode) not in MODES:
        return None
    x, widths = static_shape(value.args[0]), [int(width) for width in value.attrs.pad_width]
    if x is None or len(x) != 4 or 0 in x or any(widths[:2] + widths[6:]) or min(widths) < 0:
        return None
    top, bottom, left, right = widths[2:6]
    return top, left, bottom, right


class _Rewriter(MainRewriter):
    def __init__(self, mod: tvm.IRModule, options: LowerGroups) -> None:
        super().__init__(mod)
        self.options = options
        self._written: dict[str, relax.GlobalVar] = {}
        self._halves = self._kept_in_half()
        self._joined_by_reader: set[relax.Expr] = set()
        self._encoded: dict[relax.Expr, list[relax.Expr]] = {}
        """Codes and scales of the rows that another step's kernel encodes."""

    def _kept_in_half(self) -> dict[relax.Var, str]:
        """Tensors that take half the memory, and what they are kept as."""
        kept_as = {"float16": "float16"} if self.options.isa.float16 else {}
        if self.options.isa.name != "cuda":
            kept_as["bfloat16"] = BFLOAT16_WORDS
        rounded = {
            var: str(value.attrs["dtype"])
            for var, value in self.definition.items()
            if op_name(value) == "relax.qfp8.halve" and self.uses.get(var)
        }
        return {var: kept_as[dtype] for var, dtype in rounded.items() if dtype in kept_as}

    def parameter(self, old: relax.Var) -> relax.Var:
        return relax.Var(old.name, relax.TensorType(old.ty.shape, storage_dtype(str(old.ty.dtype))))

    def body(self) -> None:
        results = results_of(self.main)
        for block in self.main.body.blocks:
            steps = partition(block, results)
            self._joined_by_reader = self._concatenations_to_encode(steps, results)
            for step in with_encoded_rows(steps, results, on_cpu=self.options.isa.name != "cuda"):
                self.step(step)

    def _concatenations_to_encode(
        self, steps: list[Group | Single], results: set[relax.Var]
    ) -> set[relax.Expr]:
        """Those of channels that only an encode with a scale for each sample reads, which reads their parts instead."""
        alone = {
            step.members[0][0]
            for step in steps
            if isinstance(step, Group) and len(step.members) == 1 and joins_channels(step.anchor)
        }
        encoded = {
            step.value.args[0]
            for step in steps
            if isinstance(step, Single) and op_name(step.value) == "relax.qfp8.encode_samples"
        }
        on_cpu = self.options.isa.name != "cuda"
        return {var for var in (alone & encoded) - results if self.uses[var] == 1} if on_cpu else set()

    def expression(self, expr: relax.Expr) -> relax.Expr:
        if isinstance(expr, relax.TupleGetItem) and expr.tuple_value in self._encoded:
            return self._encoded[expr.tuple_value][expr.index]
        return super().expression(expr)

    def concat(self, var: relax.Var, value: relax.Call) -> None:
        parts = [self.expression(part) for part in value.args[0].fields]
        specs = [TensorSpec(shape_of(part), storage_dtype(str(part.ty.dtype))) for part in parts]
        axis = int(value.attrs.axis) % len(specs[0].shape)
        key = repr(("concat", specs, axis))
        if key not in self._written:
            if self.options.isa.name == "cuda":
                function = cuda_kernels.concat_prim_func(specs, axis)
            else:
                function = concat_prim_func(self.options.isa, specs, axis, self.options.threads)
            self._written[key] = self.builder.add_func(function.without_attr("global_symbol"), "concat")
        result = relax.TensorType(shape_of(var), specs[0].dtype)
        call = relax.call_tir(self._written[key], parts, result)
        self.variables[var] = self.builder.emit(call, var.name)

    def look_up(self, var: relax.Var, value: relax.Call) -> None:
        codes, table = value.args
        shape, values = shape_of(var), array_of(table)
        dtype = str(values.dtype)
        key = repr(("look_up", shape, dtype))
        if key not in self._written:
            function = look_up_prim_func(self.options.isa, self.options.threads, shape, dtype)
            self._written[key] = self.builder.add_func(
                function.without_attr("global_symbol"), "look_up_codes"
            )
        arguments = [self.expression(codes), relax.const(values)]
        call = relax.call_tir(self._written[key], arguments, relax.TensorType(shape, dtype))
        self.variables[var] = self.builder.emit(call, var.name)

    def resize(self, var: relax.Var, value: relax.Call, shape: ResizeShape) -> None:
        sizes = shape_of(value.args[0]), shape_of(var)
        key = repr(("resize", shape, sizes))
        if key not in self._written:
            function = resize_prim_func(self.options.isa, self.options.threads, shape, *sizes)
            self._written[key] = self.builder.add_func(function.without_attr("global_symbol"), "resize")
        places, weights = shape.taps()
        arguments = [self.expression(value.args[0]), relax.const(places), relax.const(weights)]
        call = relax.call_tir(self._written[key], arguments, relax.TensorType(sizes[1], "float32"))
        self.variables[var] = self.builder.emit(call, var.name)

    def pad(self, var: relax.Var, value: relax.Call, widths: tuple[int, int, int, int]) -> None:
        x = self.expression(value.args[0])
        source, mode = TensorSpec(shape_of(x), storage_dtype(str(x.ty.dtype))), str(value.attrs.pad_mode)
        key = repr(("pad", source, widths))
        if key not in self._written:
            function = pad_prim_func(self.options.isa, self.options.threads, source, widths)
            self._written[key] = self.builder.add_func(function.without_attr("global_symbol"), "pad")
        arguments = [x, relax.const(places(source.shape[1:3], widths, mode))]
        call = relax.call_tir(self._written[key], arguments, relax.TensorType(shape_of(var), source.dtype))
        self.variables[var] = self.builder.emit(call, var.name)

    def encode_rows(self, var: relax.Var, value: relax.Call) -> None:
        x, factors = value.args
        rotation = int(value.attrs["rotation"])

        def make(isa: InstructionSet, threads: int, sources: list[TensorSpec], layout: Layout):
            (source,) = sources
            return encode_rows_prim_func(isa, threads, source, layout, rotation)

        self._encode(var, value, make, [x], factors, shape_of(x)[:-1], rotation)

    def encode_samples(self, var: relax.Var, value: relax.Call) -> None:
        inverse = inverse_of(get_layout(str(value.attrs["layout"])))
        constant = relax.const(np.array([inverse], np.float32))
        x = value.args[0]
        parts = parts_of(self.definition[x]) if x in self._joined_by_reader else [x]
        self._encode(var, value, encode_samples_prim_func, parts, constant, shape_of(x)[:1])

    def _encode(
        self,
        var: relax.Var,
        value: relax.Call,
        make: Callable,
        parts: list[relax.Expr],
        constant: relax.Expr,
        scales: tuple[int, ...],
        rotation: int = 1,
    ) -> None:
        """Codes of the joined ``parts`` and scales of the shape ``scales``, found at run time."""
        name = op_name(value).removeprefix("relax.qfp8.")
        layout = get_layout(str(value.attrs["layout"]))
        sources = [TensorSpec(shape_of(part), self._halves.get(part, "float32")) for part in parts]
        key = repr((name, sources, layout, rotation))
        if key not in self._written:
            function = make(self.options.isa, self.options.threads, sources, layout)
            self._written[key] = self.builder.add_func(function.without_attr("global_symbol"), name)
        codes = relax.TensorType(shape_of(value.args[0]), "uint8")
        arguments = [*(self.expression(part) for part in parts), constant]
        call = relax.call_tir(self._written[key], arguments, [codes, relax.TensorType(scales, "float32")])
        self.variables[var] = self.builder.emit(call, var.name)

    def step(self, step: Group | Single) -> None:
        if isinstance(step, Single):
            on_cpu = self.options.isa.name != "cuda"
            resize = _linear_resize(step.value) if on_cpu else None
            widths = _padded_pixels(step.value) if on_cpu else None
            if _is_plain_concat(step):
                self.concat(step.var, step.value)
            elif resize is not None:
                self.resize(step.var, step.value, resize)
            elif widths is not None:
                self.pad(step.var, step.value, widths)
            elif op_name(step.value) == "relax.qfp8.look_up":
                self.look_up(step.var, step.value)
            elif op_name(step.value) == "relax.qfp8.encode_rows":
                self.encode_rows(step.var, step.value)
            elif op_name(step.value) == "relax.qfp8.encode_samples":
                self.encode_samples(step.var, step.value)
            elif op_name(step.value) == "relax.qfp8.recurrent":
                self.recurrent(step.var, step.value)
            elif op_name(step.value) != "relax.qfp8.decode":  # whose readers read codes
                self.keep(step.var, step.value)
            return
        if step.members[0][0] in self._joined_by_reader:
            return
        options = self.options
        kernel = write_kernel(
            step,
            options.isa,
            options.threads,
            options.max_error,
            options.choose,
            options.memory,
            self._halves,
        )
        result = self.kernel_call(kernel, step.members[0][0].name)
        for index, var in enumerate(step.outputs):
            self.variables[var] = (
                result
                if len(kernel.outputs) == 1
                else self.builder.emit(relax.TupleGetItem(result, index), var.name)
            )
        if step.encode_rows is not None:
            first = len(step.outputs)
            self._encoded[step.encode_rows[0]] = [
                self.builder.emit(relax.TupleGetItem(result, first + part)) for part in range(2)
            ]

    def recurrent(self, var: relax.Var, value: relax.Call) -> None:
        options = self.options
        kernel = recurrent_kernel(value, options.isa, options.threads, options.max_error, options.choose)
        self.variables[var] = self.kernel_call(kernel, var.name)

    def kernel_call(self, kernel: Kernel, name: str) -> relax.Var:
        """Emit a call of the kernel, which is written if none is equal to it; a tuple of several outputs."""
        if kernel.key not in self._written:
            # Private: the builder makes the name unique.
            function = kernel.function().without_attr("global_symbol")
            self._written[kernel.key] = self.builder.add_func(function, kernel.name)
        arguments = [
            relax.const(a, str(a.dtype)) if isinstance(a, np.ndarray) else self.expression(a)
            for a in kernel.arguments
        ]
        types = [relax.TensorType(spec.shape, spec.dtype) for spec in kernel.outputs]
        outputs = types if len(types) > 1 else types[0]
        return self.builder.emit(relax.call_tir(self._written[kernel.key], arguments, outputs), name)
