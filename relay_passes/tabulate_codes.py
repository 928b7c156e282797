"""Functions of 8-bit codes as tables of 256 results, computed here from the exact function.

Runs after quantization. Before::

    lv = R.astype(codes, "float32")               # codes of a QFP8 data type
    lv1 = R.multiply(lv, 0.02)
    lv2 = R.nn.gelu(lv1)
    lv3 = R.qfp8.encode(lv2, layout="E3M4", scale=...)

After::

    lv3 = R.qfp8.look_up(codes, <256 codes>)

A chain starts where a program casts codes to float32, so with a tensor that it holds as codes only, and goes on through
elementwise operators of that tensor and single numbers. The float32 steps round as the kernels do; functions that would
be interpolated are exact instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.dtype import codes_tensor, layout_of
from tvm_qfp8.format import Layout, encode, get_layout
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.fuse import op_name, static_shape, tensor_arguments
from tvm_qfp8.relay_passes.interpolate import called_function
from tvm_qfp8.relay_passes.rewriter import MainRewriter
from tvm_qfp8.tables.families import find_function


@dataclass(frozen=True)
class Chain:
    """A float32 tensor that is a function of codes."""

    codes: relax.Var
    values: np.ndarray
    """float32 ``(256,)``: the result for each code."""
    steps: int
    """Operators after the cast."""


def _leaky_relu(call: relax.Call, x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, x * np.float32(call.attrs.alpha))


def _clip(call: relax.Call, x: np.ndarray) -> np.ndarray:
    low, high = (np.float32(bound.value) for bound in call.args[1:])
    return np.minimum(high, np.maximum(low, x))


NUMPY: dict[str, Callable[..., np.ndarray]] = {
    "relax.add": lambda _call, a, b: a + b,
    "relax.subtract": lambda _call, a, b: a - b,
    "relax.multiply": lambda _call, a, b: a * b,
    "relax.divide": lambda _call, a, b: a / b,
    "relax.maximum": lambda _call, a, b: np.maximum(a, b),
    "relax.minimum": lambda _call, a, b: np.minimum(a, b),
    "relax.nn.relu": lambda _call, x: np.maximum(np.float32(0), x),
    "relax.nn.leakyrelu": _leaky_relu,
    "relax.clip": _clip,
    "relax.square": lambda _call, x: x * x,
    "relax.sqrt": lambda _call, x: np.sqrt(x),
    "relax.rsqrt": lambda _call, x: np.float32(1) / np.sqrt(x),
    "relax.abs": lambda _call, x: np.abs(x),
    "relax.negative": lambda _call, x: -x,
}
"""The operators of ``topi.elementwise``."""


def code_chains(mod: tvm.IRModule) -> dict[relax.Var, Chain]:
    """The float32 tensors of ``main`` that are functions of codes."""
    chains: dict[relax.Var, Chain] = {}
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            chain = _chain(binding.value, chains)
            if chain is not None:
                chains[binding.var] = chain
    return chains


def _chain(value: relax.Expr, chains: dict[relax.Var, Chain]) -> Chain | None:
    name = op_name(value)
    if not name or str(getattr(value.ty, "dtype", "")) != "float32" or not static_shape(value):
        return None
    if name == "relax.astype":
        layout = layout_of(value.args[0].ty.dtype)
        known = layout is not None and isinstance(value.args[0], relax.Var)
        return Chain(value.args[0], layout.grid.astype(np.float32), 0) if layout and known else None
    function = called_function(value)
    if function is None and name not in NUMPY:
        return None
    arguments = [value.args[0]] if function is not None else tensor_arguments(value)
    sources = [chains[a] for a in arguments if a in chains]
    if not sources or any(source.codes != sources[0].codes for source in sources):
        return None
    values = [chains[a].values if a in chains else _number(a) for a in arguments]
    if any(v is None for v in values) or static_shape(value) != static_shape(sources[0].codes):
        return None
    with np.errstate(all="ignore"):
        if function is not None:
            result = find_function(function).reference(np.asarray(values[0], np.float64))
        else:
            result = NUMPY[name](value, *values)
    steps = 1 + max(source.steps for source in sources)
    return Chain(sources[0].codes, np.asarray(result, np.float64).astype(np.float32), steps)


def _number(expr: relax.Expr) -> np.float32 | None:
    if not isinstance(expr, GenericConst) or str(expr.ty.dtype) != "float32":
        return None
    array = expr.value.numpy()
    return np.float32(array.reshape(-1)[0]) if array.size == 1 else None


def _encoding(value: relax.Expr) -> tuple[Layout, float] | None:
    """Layout and scale where ``value`` encodes a float32 tensor with one scale."""
    if op_name(value) == "relax.qfp8.encode" and len(value.args) == 1:
        return get_layout(str(value.attrs["layout"])), float(value.attrs["scale"])
    layout = layout_of(value.ty.dtype) if op_name(value) == "relax.astype" else None
    return (layout, 1.0) if layout is not None else None


@tvm.transform.module_pass(opt_level=0, name="TabulateCodes")
class TabulateCodes:
    """Rewrite ``main``."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        chains = code_chains(mod)
        return _Rewriter(mod, chains).rewrite() if chains else mod


class _Rewriter(MainRewriter):
    def __init__(self, mod: tvm.IRModule, chains: dict[relax.Var, Chain]) -> None:
        super().__init__(mod)
        self.chains = chains
        self.read: set[relax.Var] = set()
        """Chains that are read as float32 by something else."""
        readers = [v for var, v in self.definition.items() if var not in chains and _encoding(v) is None]
        for expr in (*readers, self.main.body.body):
            relax.analysis.post_order_visit(expr, lambda e: self.read.add(e) if e in chains else None)

    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        chain = self.chains.get(var)
        encoding = _encoding(value)
        if encoding is not None and value.args[0] in self.chains:
            chain = self.chains[value.args[0]]
            layout, scale = encoding
            # As the kernels do, NaN becomes code 0.
            codes = encode(np.nan_to_num(chain.values, nan=0.0, posinf=np.inf, neginf=-np.inf), scale, layout)
            table: relax.Expr = relax.const(codes_tensor(codes, layout))
        elif chain is not None and var not in self.read:
            return
        elif chain is None or not chain.steps:
            self.keep(var, value)
            return
        else:
            table = relax.const(chain.values)
        call = qfp8_ops.look_up(self.expression(chain.codes), table)
        self.variables[var] = self.builder.emit(call, var.name)


def is_tabulated(chain: Chain | None) -> bool:
    """Whether a tensor becomes a look-up, or a part of one."""
    return chain is not None and chain.steps > 0
