"""From a group of bindings to one PrimFunc: chooses the kernel of the anchor and emits the rest as its epilogue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import relax, tirx
from tvm.ir import GenericConst
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.format import Layout, get_layout
from tvm_qfp8.relay_passes.fuse import Group, op_name, static_shape, tensor_arguments
from tvm_qfp8.tables import build_table
from tvm_qfp8.topi.batch_matmul import BatchMatmulShape, emit_batch_matmul
from tvm_qfp8.topi.codec import encode_expr
from tvm_qfp8.topi.conv2d import ConvShape, emit_conv2d, pack_conv_weights
from tvm_qfp8.topi.depthwise import emit_depthwise, is_depthwise, pack_depthwise_weights
from tvm_qfp8.topi.elementwise import emit_elementwise
from tvm_qfp8.topi.float_contract import add, bind, dtype_of, lanes_of, mul, to_float
from tvm_qfp8.topi.float_linear import FloatConvShape, emit_float_conv2d, pack_float_weights
from tvm_qfp8.topi.float_matmul import emit_float_batch_matmul
from tvm_qfp8.topi.gemm import GemmShape, emit_gemm, gemm_tile
from tvm_qfp8.topi.interpolate import emit_table
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import pack_panels, pad_channels
from tvm_qfp8.topi.pooling import PoolShape, emit_global_mean, emit_pool
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, load, store, vector_runs
from tvm_qfp8.topi.rows import Row, emit_layer_norm, emit_softmax, for_each_row

MIN_PARALLEL_ELEMENTS = 65_536


def storage_dtype(dtype: str) -> str:
    """uint8 for a QFP8 data type, any other dtype unchanged."""
    return "uint8" if dtype.startswith("custom[qfp8") else dtype


@dataclass
class Kernel:
    """A kernel to be written: arguments in order (Relax expressions or packed constants), then outputs."""

    name: str
    key: str
    arguments: list[relax.Expr | np.ndarray]
    outputs: list[TensorSpec]
    function: Callable[[], tirx.PrimFunc]


class _Operands:
    """Collects the tensors a kernel reads. ``scalars`` go to one small float32 argument, so that kernels that
    differ only in scales are written once."""

    def __init__(self) -> None:
        self.arguments: list[relax.Expr | np.ndarray] = []
        self.specs: list[TensorSpec] = []
        self.scalars: list[float] = []
        self._index: dict[relax.Expr, int] = {}

    def tensor(self, expr: relax.Expr) -> int:
        if expr not in self._index:
            shape = static_shape(expr)
            self._index[expr] = self._append(expr, TensorSpec(shape, storage_dtype(str(expr.ty.dtype))))
        return self._index[expr]

    def constant(self, value: np.ndarray) -> int:
        return self._append(value, TensorSpec(value.shape, str(value.dtype)))

    def scalar(self, value: float) -> int:
        self.scalars.append(float(value))
        return len(self.scalars) - 1

    def finish(self) -> int:
        """Append the scalars; the index of their argument."""
        return self.constant(np.asarray(self.scalars or [0.0], np.float32))

    def _append(self, value, spec: TensorSpec) -> int:
        self.arguments.append(value)
        self.specs.append(spec)
        return len(self.arguments) - 1


def _array(constant: relax.Expr) -> np.ndarray:
    data = constant.value
    if str(constant.ty.dtype).startswith("custom["):
        return data._create_view(data.shape, "uint8").numpy()
    return data.numpy()


@dataclass(frozen=True)
class _External:
    """How an operand of the epilogue is read: an argument with a shape aligned to the output's, or a scalar."""

    argument: int | None
    scalar: int | None
    shape: tuple[int, ...]
    padded: bool = False
    """A vector may be read past the end."""


class _Epilogue:
    """The members after the anchor, as vector code."""

    def __init__(self, group: Group, isa: InstructionSet, operands: _Operands, skip: int) -> None:
        self.group, self.isa = group, isa
        self.shape = static_shape(group.members[0][0])
        self.columns = self.shape[-1] if self.shape else 1
        self.members = group.members[skip:]
        inner = {var for var, _ in group.members}
        self.externals: dict[relax.Expr, _External] = {}
        self.encode_scalars: dict[relax.Var, int] = {}
        for var, call in self.members:
            for argument in tensor_arguments(call):
                if argument not in inner and argument not in self.externals:
                    self.externals[argument] = self._external(argument, operands)
            if op_name(call) == "relax.qfp8.encode":
                reciprocal = np.float32(1.0) / np.float32(float(call.attrs["scale"]))
                self.encode_scalars[var] = operands.scalar(float(reciprocal))
        self.buffers: list = []
        self.outputs: dict = {}
        self.scalar_buffer = None

    def _external(self, expr: relax.Expr, operands: _Operands) -> _External:
        shape = static_shape(expr)
        aligned = (1,) * (len(self.shape) - len(shape)) + shape
        if isinstance(expr, GenericConst):
            array = np.asarray(_array(expr), np.float32)
            if array.size == 1:
                return _External(None, operands.scalar(float(array.reshape(-1)[0])), aligned)
            if array.size == aligned[-1]:
                return _External(operands.constant(pad_channels(array.reshape(-1))), None, aligned, padded=True)
        return _External(operands.tensor(expr), None, aligned)

    def _index(self, shape: tuple[int, ...], row, column):
        """Flat index of the element of a broadcast operand that belongs to (row, column) of the output."""
        if shape == self.shape:
            return row * self.columns + column
        index = column if shape[-1] != 1 else None
        stride, inner = (shape[-1] if shape[-1] != 1 else 1), 1
        for extent, own in zip(reversed(self.shape[:-1]), reversed(shape[:-1]), strict=True):
            if own != 1:
                coordinate = tirx.floormod(tirx.floordiv(row, inner), extent) if inner != 1 else tirx.floormod(row, extent)
                term = coordinate * stride
                index = term if index is None else index + term
                stride *= own
            inner *= extent
        return 0 if index is None else index

    def _scalar(self, index: int, lanes: int):
        value = load(self.scalar_buffer, index, 1)
        return value if lanes == 1 else tirx.Broadcast(value, lanes)

    def _read(self, external: _External, row, column, lanes: int, valid: int):
        if external.scalar is not None:
            return self._scalar(external.scalar, lanes)
        buffer = self.buffers[external.argument]
        at = self._index(external.shape, row, column)
        if external.shape[-1] == 1 and self.columns != 1:
            value = bind(load(buffer, at, 1))
            return value if lanes == 1 else tirx.Broadcast(value, lanes)
        if valid == lanes or external.padded:
            return bind(load(buffer, at, lanes))
        part = T.alloc_buffer((lanes,), str(buffer.dtype), scope="local")
        for lane in range(valid):
            store(part, lane, load(buffer, at + lane, 1), 1)
        for lane in range(valid, lanes):
            store(part, lane, tirx.const(0, str(buffer.dtype)), 1)
        return bind(load(part, 0, lanes))

    def _write(self, var: relax.Var, value, row, column, lanes: int, valid: int) -> None:
        buffer = self.outputs[var]
        at = row * self.columns + column
        if valid == lanes:
            store(buffer, at, value, lanes)
            return
        part = T.alloc_buffer((lanes,), str(buffer.dtype), scope="local")
        store(part, 0, value, lanes)
        for lane in range(valid):
            store(buffer, at + lane, load(part, lane, 1), 1)

    def emit(self, value, row, column, lanes: int, valid: int, start: relax.Var | None) -> None:
        """Finish one vector: ``value`` is the anchor's result (None where the anchor itself is in the members)."""
        values: dict[relax.Expr, object] = {}
        if start is not None:
            values[start] = value
            if start in self.outputs:
                self._write(start, value, row, column, lanes, valid)
        for var, call in self.members:
            arguments = [
                values[a] if a in values else self._read(self.externals[a], row, column, lanes, valid)
                for a in tensor_arguments(call)
            ]
            result = self._compute(var, call, arguments, lanes)
            values[var] = result
            if var in self.outputs:
                self._write(var, result, row, column, lanes, valid)

    def _compute(self, var, call, arguments: list, lanes: int):
        name = op_name(call)
        if name == "relax.qfp8.encode":
            reciprocal = self._scalar(self.encode_scalars[var], lanes)
            return encode_expr(bind(mul(arguments[0], reciprocal)), get_layout(str(call.attrs["layout"])))
        if name == "relax.qfp8.interpolate":
            table = build_table(str(call.attrs["function"]), max_error=float(call.attrs["max_error"]))
            return bind(emit_table(table, arguments[0], self.isa))
        if name == "relax.clip":
            return emit_elementwise(name, tuple(float(bound.value) for bound in call.args[1:]), arguments)
        return emit_elementwise(name, call.attrs, arguments)


def write_kernel(group: Group, isa: InstructionSet, threads: int, max_error: float) -> Kernel:
    """The kernel of ``group`` for one instruction set and number of threads.

    ``max_error`` bounds the error of a softmax; interpolated functions carry their own.
    """
    anchor_var, anchor = group.members[0]
    name = op_name(anchor)
    operands = _Operands()
    if name in _ANCHORS:
        extra = (max_error,) if name in _TABLES_INSIDE else ()
        body, shape_key = _ANCHORS[name](anchor, isa, threads, operands, *extra)
        epilogue = _Epilogue(group, isa, operands, skip=1)
        start = anchor_var
    else:
        epilogue = _Epilogue(group, isa, operands, skip=0)
        body, shape_key = _elementwise_body(epilogue, isa, threads), ("elementwise", epilogue.shape)
        start = None
    scalars = operands.finish()
    outputs = [
        TensorSpec(static_shape(var), storage_dtype(str(var.ty.dtype))) for var in group.outputs
    ]
    short = "_".join(op_name(call).split(".")[-1] for _, call in group.members)

    def function() -> tirx.PrimFunc:
        def emit(*buffers) -> None:
            inputs, results = buffers[: len(operands.specs)], buffers[len(operands.specs) :]
            epilogue.buffers = list(inputs)
            epilogue.scalar_buffer = inputs[scalars]
            epilogue.outputs = dict(zip(group.outputs, results, strict=True))
            body(inputs, lambda *position: epilogue.emit(*position, start=start))

        return build_prim_func(short[:60], [*operands.specs, *outputs], emit)

    members = [(op_name(call), _attributes(call), _wiring(group, call)) for _, call in group.members]
    written = [[var for var, _ in group.members].index(var) for var in group.outputs]
    externals = [(e.argument, e.scalar, e.shape) for e in epilogue.externals.values()]
    key = repr((shape_key, members, written, externals, operands.specs, outputs, isa.name, threads))
    return Kernel(short[:60], key, operands.arguments, outputs, function)


def _attributes(call) -> str:
    if op_name(call) == "relax.qfp8.encode":
        return str(call.attrs["layout"])  # the scale is a run-time scalar
    if op_name(call) == "relax.qfp8.batch_matmul":
        return str(call.attrs["transpose_y"])
    return str(call.attrs) + str([float(a.value) for a in call.args if isinstance(a, tirx.FloatImm | tirx.IntImm)])


def _wiring(group: Group, call) -> list:
    inner = {var: index for index, (var, _) in enumerate(group.members)}
    return [inner.get(argument, -1) if isinstance(argument, relax.Var) else -1 for argument in call.args]


def _elementwise_body(epilogue: _Epilogue, isa: InstructionSet, threads: int) -> Callable:
    shape = epilogue.shape
    size = int(np.prod(shape, dtype=np.int64))
    flat = all(e.scalar is not None or e.shape == shape for e in epilogue.externals.values())
    if flat:
        epilogue.columns = size
        epilogue.shape = (size,)
        epilogue.externals = {
            expr: _External(e.argument, e.scalar, (size,) if e.scalar is None else e.shape)
            for expr, e in epilogue.externals.items()
        }

    def body(_inputs, finish) -> None:
        parallel = T.parallel if threads > 1 and size >= MIN_PARALLEL_ELEMENTS else T.serial
        columns = epilogue.columns
        chunk = 4096 if flat and size > 8192 else columns
        if flat:
            with parallel(0, size // chunk) as block:
                vector_runs(chunk, isa.lanes, lambda at, lanes: finish(None, 0, block * chunk + at, lanes, lanes))
            if size % chunk:
                start = size // chunk * chunk
                vector_runs(size - start, isa.lanes, lambda at, lanes: finish(None, 0, start + at, lanes, lanes))
            return
        with parallel(0, size // columns) as row:
            vector_runs(columns, isa.lanes, lambda at, lanes: finish(None, row, at, lanes, lanes))

    return body


def _scaled(a, bias, finish: Callable) -> Callable:
    """fl32(acc) -> * a[c] -> + bias[c], the fixed start of every linear epilogue."""

    def epilogue(total, row, column, valid) -> None:
        lanes = lanes_of(total)
        value = to_float(total) if dtype_of(total).startswith("int32") else total
        value = bind(mul(value, load(a, column, lanes)))
        value = bind(add(value, load(bias, column, lanes)))
        finish(value, row, column, lanes, valid)

    return epilogue


def _layout_of(expr: relax.Expr) -> Layout | None:
    """The layout of a QFP8 tensor, None for float32."""
    if str(expr.ty.dtype) == "float32":
        return None
    name = str(expr.ty.dtype).removeprefix("custom[qfp8_").split("]")[0]
    return get_layout(name.upper())


def _matmul(call, isa: InstructionSet, threads: int, operands: _Operands):
    x, weight, a, bias = call.args
    rows = int(np.prod(static_shape(x)[:-1], dtype=np.int64))
    columns, depth = static_shape(weight)
    if _layout_of(x) is None:
        one_row = ConvShape(
            1, 1, rows, depth, columns, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, None, _layout_of(weight)
        )
        return _float_linear(call, one_row, _array(weight).reshape(columns, 1, 1, depth), isa, threads, operands)
    shape = GemmShape(rows, columns, depth, _layout_of(x), _layout_of(weight))
    _, vectors = gemm_tile(isa, rows, columns)
    operands.tensor(x)
    operands.constant(pack_panels(_array(weight), vectors * isa.lanes, isa.pair))
    operands.constant(pad_channels(_array(a)))
    operands.constant(pad_channels(_array(bias)))

    def body(inputs, finish) -> None:
        emit_gemm(isa, shape, inputs[0], inputs[1], _scaled(inputs[2], inputs[3], finish), threads)

    return body, shape


def conv_shape(call) -> ConvShape:
    """The static description of a ``qfp8.conv2d`` call."""
    x, weight = call.args[:2]
    batch, height, width, channels = static_shape(x)
    out_channels, kernel_h, kernel_w, _ = static_shape(weight)
    attrs = call.attrs
    return ConvShape(
        batch,
        height,
        width,
        channels,
        out_channels,
        (kernel_h, kernel_w),
        tuple(int(s) for s in attrs["strides"]),
        tuple(int(p) for p in attrs["padding"]),
        tuple(int(d) for d in attrs["dilation"]),
        int(attrs["groups"]),
        _layout_of(x),
        _layout_of(weight),
        tuple(int(d) for d in attrs["input_dilation"]),
    )


def _float_linear(
    call, conv: ConvShape, weights: np.ndarray, isa: InstructionSet, threads: int, operands: _Operands
):
    """A layer whose activations stay float32."""
    shape = FloatConvShape(conv, conv.weight)
    operands.tensor(call.args[0])
    operands.constant(pack_float_weights(isa, shape, weights))
    operands.constant(pad_channels(_array(call.args[2])))
    operands.constant(pad_channels(_array(call.args[3])))

    def body(inputs, finish) -> None:
        emit_float_conv2d(isa, shape, inputs[0], inputs[1], _scaled(inputs[2], inputs[3], finish), threads)

    return body, shape


def _conv2d(call, isa: InstructionSet, threads: int, operands: _Operands):
    shape = conv_shape(call)
    x, weight, a, bias = call.args
    codes = _array(weight)
    if shape.activation is None:
        return _float_linear(call, shape, codes, isa, threads, operands)
    operands.tensor(x)
    if shape.is_pointwise:
        rows = shape.batch * shape.height * shape.width
        dense = GemmShape(rows, shape.out_channels, shape.channels, shape.activation, shape.weight)
        _, vectors = gemm_tile(isa, rows, shape.out_channels)
        packed = pack_panels(codes.reshape(shape.out_channels, -1), vectors * isa.lanes, isa.pair)
        emit: Callable = emit_gemm
        described: GemmShape | ConvShape = dense
    elif is_depthwise(isa, shape):
        packed, emit, described = pack_depthwise_weights(isa, shape, codes), emit_depthwise, shape
    else:
        packed, emit, described = pack_conv_weights(isa, shape, codes), emit_conv2d, shape
    operands.constant(packed)
    operands.constant(pad_channels(_array(a)))
    operands.constant(pad_channels(_array(bias)))

    def body(inputs, finish) -> None:
        emit(isa, described, inputs[0], inputs[1], _scaled(inputs[2], inputs[3], finish), threads)

    return body, described


def _batch_matmul(call, isa: InstructionSet, threads: int, operands: _Operands):
    x, y = call.args
    x_shape, y_shape = static_shape(x), static_shape(y)
    transpose = bool(call.attrs["transpose_y"])
    shape = BatchMatmulShape(
        int(np.prod(x_shape[:-2], dtype=np.int64)),
        x_shape[-2],
        y_shape[-2] if transpose else y_shape[-1],
        x_shape[-1],
        _layout_of(x),
        _layout_of(y),
        transpose,
    )
    x_at, y_at = operands.tensor(x), operands.tensor(y)
    scale = operands.scalar(float(call.attrs["scale"]))

    def body(inputs, finish) -> None:
        scalars = inputs[-1]

        def epilogue(total, row, column, valid) -> None:
            factor = tirx.Broadcast(load(scalars, scale, 1), isa.lanes)
            finish(bind(mul(total, factor)), row, column, isa.lanes, valid)

        emit = emit_float_batch_matmul if shape.x is None else emit_batch_matmul
        emit(isa, shape, inputs[x_at], inputs[y_at], epilogue, threads)

    return body, shape


def _row_shape(x: relax.Expr) -> tuple[int, int]:
    shape = static_shape(x)
    return int(np.prod(shape[:-1], dtype=np.int64)), shape[-1]


def _softmax(call, isa: InstructionSet, threads: int, operands: _Operands, max_error: float):
    rows, length = _row_shape(call.args[0])
    at = operands.tensor(call.args[0])
    logarithmic = op_name(call) == "relax.nn.log_softmax"
    # A row holds x - max <= 0: without the positive half and the denormals the table is cheaper.
    exp_table = build_table("exp", max_error=max_error / 4, domain=(-87.0, 0.0))
    log_table = build_table("log", max_error=max_error / 4)

    def body(inputs, finish) -> None:
        def one(index) -> None:
            row = Row(isa, length)
            emit_softmax(
                row,
                lambda offset, lanes: load(inputs[at], index * length + offset, lanes),
                lambda v: bind(emit_table(exp_table, v, isa)),
                (lambda v: bind(emit_table(log_table, v, isa))) if logarithmic else None,
                lambda value, offset, lanes: finish(value, index, offset, lanes, lanes),
            )

        for_each_row(rows, length, threads, one)

    return body, (op_name(call), rows, length, max_error)


def _layer_norm(call, isa: InstructionSet, threads: int, operands: _Operands):
    x, gamma, beta = call.args
    rows, length = _row_shape(x)
    at = operands.tensor(x)
    scale = operands.constant(pad_channels(_array(gamma).reshape(-1)))
    shift = operands.constant(pad_channels(_array(beta).reshape(-1)))

    def body(inputs, finish) -> None:
        def one(index) -> None:
            def scaled(value, offset, lanes) -> None:
                value = bind(mul(value, load(inputs[scale], offset, lanes)))
                value = bind(add(value, load(inputs[shift], offset, lanes)))
                finish(value, index, offset, lanes, lanes)

            emit_layer_norm(
                Row(isa, length),
                lambda offset, lanes: load(inputs[at], index * length + offset, lanes),
                float(call.attrs.epsilon),
                scaled,
            )

        for_each_row(rows, length, threads, one)

    return body, ("layer_norm", rows, length)


def _pool(call, isa: InstructionSet, threads: int, operands: _Operands):
    at = operands.tensor(call.args[0])
    shape = static_shape(call.args[0])
    if op_name(call) == "relax.mean":
        described = ("global_mean", shape)

        def body(inputs, finish) -> None:
            emit_global_mean(isa, shape, inputs[at], lambda v, r, c, lanes: finish(v, r, c, lanes, lanes))
    else:
        attrs = call.attrs
        pool = PoolShape(
            *shape,
            tuple(int(v) for v in attrs.pool_size),
            tuple(int(v) for v in attrs.strides),
            tuple(int(v) for v in attrs.padding),
            "max" if op_name(call) == "relax.nn.max_pool2d" else "mean",
            bool(attrs.count_include_pad),
        )
        described = pool

        def body(inputs, finish) -> None:
            emit_pool(isa, pool, inputs[at], lambda v, r, c, lanes: finish(v, r, c, lanes, lanes), threads)

    return body, described


_TABLES_INSIDE = ("relax.nn.softmax", "relax.nn.log_softmax")
_ANCHORS: dict[str, Callable] = {
    "relax.qfp8.matmul": _matmul,
    "relax.qfp8.conv2d": _conv2d,
    "relax.qfp8.batch_matmul": _batch_matmul,
    "relax.nn.softmax": _softmax,
    "relax.nn.log_softmax": _softmax,
    "relax.nn.layer_norm": _layer_norm,
    "relax.mean": _pool,
    "relax.nn.max_pool2d": _pool,
    "relax.nn.avg_pool2d": _pool,
}

