"""Nonlinear layers as torch, onnxruntime, TVM and this compiler run them, for timing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import tvm
from onnx import TensorProto, helper
from tvm import relax

from tvm_qfp8.code_generation import generate_code
from tvm_qfp8.relay_passes.interpolate import Interpolate
from tvm_qfp8.relay_passes.lower_groups import LowerGroups
from tvm_qfp8.relay_passes.prepare import prepare
from tvm_qfp8.tables import build_table
from tvm_qfp8.targets import cpu_features, isa, parse_target
from tvm_qfp8.topi.isa import instruction_set

Run = Callable[[], object]
F = torch.nn.functional
op = relax.op
EPSILON = 1e-5
X86_LEVELS = {"avx512": 3, "avx2": 2, "sse2": 1}


@dataclass(frozen=True)
class Layer:
    """One nonlinear layer."""

    name: str
    emit: Callable[[Callable, relax.Var], relax.Expr]
    """Emits it as plain Relax operators: ``emit(builder.emit, x)``."""
    torch: Callable[[torch.Tensor], torch.Tensor] | None
    onnx: str | None
    """ONNX operator."""
    columns: int | None = None
    """Length of a row; None for scalar functions."""
    attributes: dict[str, Any] = field(default_factory=dict)

    def shape(self, size: int) -> tuple[int, ...]:
        """The shape of ``size`` values."""
        return (size,) if self.columns is None else (size // self.columns, self.columns)

    @property
    def peers(self) -> dict[str, Callable[[np.ndarray], Run]]:
        """Makers of the runners that a user would take otherwise."""
        found: dict[str, Callable[[np.ndarray], Run]] = {}
        if self.torch is not None:
            found["torch"] = self._torch
        if self.onnx is not None:
            found["onnxruntime"] = self._onnxruntime
        return found

    def _torch(self, x: np.ndarray) -> Run:
        torch.set_num_threads(1)
        tensor, function = torch.from_numpy(x), self.torch
        assert function is not None

        def run() -> torch.Tensor:
            with torch.inference_mode():
                return function(tensor)

        return run

    def _onnxruntime(self, x: np.ndarray) -> Run:
        """Input and output bound, so that nothing is allocated or copied in a call."""
        shape = list(x.shape)
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)]
        constants = []
        if self.onnx == "LayerNormalization":
            ones = np.ones(shape[-1], np.float32)
            constants = [onnx.numpy_helper.from_array(ones, "w"), onnx.numpy_helper.from_array(0 * ones, "b")]
        node = helper.make_node(self.onnx, ["x", *(c.name for c in constants)], ["y"], **self.attributes)
        graph = helper.make_graph([node], "layer", inputs, outputs, constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        y = np.empty_like(x)
        binding = session.io_binding()
        binding.bind_input("x", "cpu", 0, np.float32, shape, x.ctypes.data)
        binding.bind_output("y", "cpu", 0, np.float32, shape, y.ctypes.data)

        def run() -> np.ndarray:
            session.run_with_iobinding(binding)
            return y

        return run

    def program(self, shape: tuple[int, ...]) -> tvm.IRModule:
        """The layer alone, as the importers would deliver it."""
        builder = relax.BlockBuilder()
        x = relax.Var("x", relax.TensorType(shape, "float32"))
        with builder.function("main", [x]):
            with builder.dataflow():
                output = builder.emit_output(self.emit(builder.emit, x))
            builder.emit_func_output(output)
        return builder.get()


def _const(value: float) -> relax.Expr:
    return relax.const(np.float32(value))


def _one(operator: Callable) -> Callable:
    return lambda emit, x: operator(x)


def _gelu(emit, x):
    return op.multiply(
        emit(op.multiply(x, _const(0.5))),
        emit(op.add(emit(op.erf(emit(op.multiply(x, _const(0.5**0.5))))), _const(1))),
    )


def _gelu_tanh(emit, x):
    cube = emit(op.multiply(emit(op.multiply(x, x)), x))
    inner = emit(op.add(x, emit(op.multiply(cube, _const(0.044715)))))
    tanh = emit(op.tanh(emit(op.multiply(inner, _const((2 / np.pi) ** 0.5)))))
    return op.multiply(emit(op.multiply(x, _const(0.5))), emit(op.add(tanh, _const(1))))


def _sigmoid(emit, x):
    return op.divide(_const(1), emit(op.add(emit(op.exp(emit(op.negative(x)))), _const(1))))


def _silu(emit, x):
    return op.multiply(x, emit(_sigmoid(emit, x)))


def _softplus(emit, x):
    return op.log(emit(op.add(emit(op.exp(x)), _const(1))))


def _mish(emit, x):
    return op.multiply(x, emit(op.tanh(emit(_softplus(emit, x)))))


def _elu(emit, x):
    below = emit(op.subtract(emit(op.exp(emit(op.minimum(x, _const(0))))), _const(1)))
    return op.where(emit(op.greater(x, _const(0))), x, below)


def _layer_norm(emit, x):
    ones = np.ones(int(x.ty.shape[-1]), np.float32)
    return op.nn.layer_norm(x, relax.const(ones), relax.const(0 * ones), axes=-1, epsilon=EPSILON)


_LAYERS = (
    Layer("gelu", _gelu, F.gelu, "Gelu"),
    Layer(
        "gelu_tanh",
        _gelu_tanh,
        lambda x: F.gelu(x, approximate="tanh"),
        "Gelu",
        attributes={"approximate": "tanh"},
    ),
    Layer("silu", _silu, F.silu, None),
    Layer("mish", _mish, F.mish, "Mish"),
    Layer("softplus", _softplus, F.softplus, "Softplus"),
    Layer("erf", _one(op.erf), torch.erf, "Erf"),
    Layer("elu", _elu, F.elu, "Elu"),
    Layer("tanh", _one(op.tanh), torch.tanh, "Tanh"),
    Layer("sigmoid", _sigmoid, torch.sigmoid, "Sigmoid"),
    Layer("exp", _one(op.exp), torch.exp, "Exp"),
    Layer("softmax_128", _one(op.nn.softmax), lambda x: torch.softmax(x, -1), "Softmax", 128),
    Layer("softmax_1024", _one(op.nn.softmax), lambda x: torch.softmax(x, -1), "Softmax", 1024),
    Layer(
        "layer_norm",
        _layer_norm,
        lambda x: F.layer_norm(x, x.shape[-1:], torch.ones(x.shape[-1]), torch.zeros(x.shape[-1]), EPSILON),
        "LayerNormalization",
        1024,
        {"epsilon": EPSILON},
    ),
)
LAYERS = {layer.name: layer for layer in _LAYERS}
"""By name."""


def runs_here(target: str) -> bool:
    """Whether this CPU has the instruction set of ``target``."""
    native, other = isa(parse_target("native")), isa(parse_target(target))
    return X86_LEVELS.get(other, 9) <= X86_LEVELS.get(native, 0) or target == "native"


def copy_runner(x: np.ndarray) -> Run:
    """A plain copy."""
    y = np.empty_like(x)
    return lambda: np.copyto(y, x)


def ours(layer: Layer, x: np.ndarray, target: str, max_error: float) -> tuple[Run, str]:
    """The kernel of this compiler, called with preallocated arrays, and the form of its table."""
    parsed = parse_target(target)
    instructions = instruction_set(isa(parsed), cpu_features(parsed))
    with parsed:
        lowered = prepare(layer.program(x.shape))
        for transform in (Interpolate(max_error), LowerGroups(instructions, 1, max_error)):
            lowered = transform(lowered)
    kernels = [f for f in lowered.functions.values() if isinstance(f, tvm.tirx.PrimFunc)]
    if len(kernels) != 1:
        raise RuntimeError(f"{layer.name} became {len(kernels)} kernels; expected one")
    calls: list[relax.Call] = []
    relax.analysis.post_order_visit(
        lowered["main"],
        lambda e: calls.append(e) if isinstance(e, relax.Call) and e.op.name == "relax.call_tir" else None,
    )
    arguments = [
        tvm.runtime.tensor(x) if isinstance(a, relax.Var) else a.value for a in calls[0].args[1].fields
    ]
    module = generate_code(tvm.IRModule({"main": kernels[0].with_attr("global_symbol", "main")}), parsed)
    function = module.mod["main"]
    y = tvm.runtime.tensor(np.zeros_like(x))
    return (lambda: (function(*arguments, y), y)[1]), _form(layer, max_error)


def _form(layer: Layer, max_error: float) -> str:
    if layer.columns is not None:
        return "row kernel"
    table = build_table(layer.name, max_error=max_error)
    return f"{table.cells} cells of degree {table.degree}, {table.reduction}"


def fast_math_runner(layer: Layer, x: np.ndarray) -> Run:
    """TVM's own approximations (FastMathTransform), fused and vectorised by TVM."""
    mod = relax.transform.FastMathTransform()(layer.program(x.shape))
    target = parse_target("native")
    with target:
        mod = relax.get_pipeline("zero")(mod)
    machine = relax.VirtualMachine(tvm.compile(mod, target=target), tvm.cpu())
    value = tvm.runtime.tensor(x)
    return lambda: machine["main"](value)
