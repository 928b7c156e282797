"""Turns QFP8 data types into bytes and arithmetic, in Relax and TIR functions alike.

Before::

    lv: R.Tensor((4, 16), "custom[qfp8_e2m5]8") = R.astype(x, "custom[qfp8_e2m5]8")
    B[i, j] = T.Cast("float32", A[i, j]) * T.float32(2)         # A: T.Buffer((4, 16), "custom[qfp8_e2m5]8")

After::

    lv = R.call_tir(cls.encode, (x,), out_ty=R.Tensor((4, 16), "uint8"))
    B[i, j] = <grid value of the code A[i, j]> * T.float32(2)   # A: T.Buffer((4, 16), "uint8")

A cast from a QFP8 type gives the grid value, a cast to one rounds to the grid; both by ``topi.codec``. Tensors,
buffers, variables and constants become uint8. Runs after the operators on QFP8 tensors have their kernels and before
anything is scheduled, tuned or compiled: TVM's code generator does not know the types, and serialisation inside the
tuner loses their width.

Arithmetic or comparison on values of a QFP8 type is refused, because on bytes it would mean something else; so is a
Relax operator that does more than move data.
"""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import ir, relax, tirx, topi

from tvm_qfp8.data_movement import MOVES_DATA
from tvm_qfp8.dtype import layout_of, tensor_codes
from tvm_qfp8.errors import UnsupportedOperatorError
from tvm_qfp8.format import Layout
from tvm_qfp8.topi.codec import decode_expr, encode_expr
from tvm_qfp8.topi.float_contract import lanes_of, with_lanes

TAKES_CODES = MOVES_DATA | {
    "relax.call_dps_packed",
    "relax.call_pure_packed",
    "relax.call_tir",
    "relax.call_tir_inplace",
}
"""Relax operators that give the same result on codes as on the numbers they stand for."""

MOVES_VALUES = frozenset({"prim.if_then_else", "prim.likely", "tirx.reinterpret"})
"""TIR intrinsics of which the same holds."""

_ARITHMETIC = (
    tirx.Add,
    tirx.Sub,
    tirx.Mul,
    tirx.Div,
    tirx.Mod,
    tirx.FloorDiv,
    tirx.FloorMod,
    tirx.Min,
    tirx.Max,
    tirx.EQ,
    tirx.NE,
    tirx.LT,
    tirx.LE,
    tirx.GT,
    tirx.GE,
)


@tvm.transform.module_pass(opt_level=0, name="LowerDtype")
class LowerDtype:
    """Lower every QFP8 type of a module; functions without one stay the same objects."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        mod = _CastsToKernels(mod).transform()
        functions = dict(mod.functions_items())
        changed = {var.name_hint for var, function in functions.items() if _mentions_qfp8(function)}
        if not changed:
            return mod
        # A GlobalVar carries the type of its function, so a function that changes gets a new one.
        renewed = {name: ir.GlobalVar(name) for name in sorted(changed)}
        lowered = {}
        for var, function in functions.items():
            result = _Lowering(renewed).function(function)
            target = renewed.get(var.name_hint, var)
            if target is not var:
                relax.expr._update_type(target, result.ty)
            lowered[target] = result
        return tvm.IRModule(lowered, attrs=mod.attrs, global_infos=mod.global_infos)


@relax.expr_functor.mutator
class _CastsToKernels(relax.PyExprMutator):
    """``R.astype`` from or to a QFP8 type becomes a call of a TIR function with the cast in it."""

    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.mod_ = mod

    def transform(self) -> tvm.IRModule:
        for var, function in self.mod_.functions_items():
            if isinstance(function, relax.Function) and _has_relax_cast(function):
                self.builder_.update_func(var, self.visit_expr(function))
        return self.builder_.get()

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        """Rewrite one call."""
        call = self.visit_expr_post_order(call)
        if not _is_relax_cast(call):
            return call
        # The name of a data type, unlike the type itself, has lost its 8 bits.
        target = _layout_of_type(call.ty)
        dtype = str(call.attrs.dtype) if target is None else target.ir_dtype
        name = "decode" if target is None else "encode"
        return self.builder_.call_te(topi.cast, call.args[0], dtype, primfunc_name_hint=name)


def _is_relax_cast(call: ir.Call) -> bool:
    if not isinstance(call.op, ir.Op) or call.op.name != "relax.astype":
        return False
    return any(_layout_of_type(ty) is not None for ty in (call.ty, call.args[0].ty))


def _has_relax_cast(function: relax.Function) -> bool:
    def look(call) -> tvm_ffi.VisitInterrupt | None:
        return tvm_ffi.VisitInterrupt() if _is_relax_cast(call) else None

    return tvm_ffi.structural_walk(function, (ir.Call, look)) is not None


class _Lowering:
    """Lowers one function; variables that are remade are remembered for their uses."""

    def __init__(self, globals_: dict[str, ir.GlobalVar]) -> None:
        self._globals = globals_
        self._variables: dict[ir.Var, ir.Var] = {}
        self._callbacks = [
            (ir.PrimType, lambda ty, _mutator: _storage_type(ty)),
            (ir.GlobalVar, lambda var, _mutator: self._globals.get(var.name_hint, var)),
            (ir.GenericConst, _constant),
            (ir.Var, self._variable),
            (tirx.Cast, _cast),
            (ir.Call, _call),
            (tirx.Broadcast, _broadcast),
            (tirx.Select, _select),
            (_ARITHMETIC, _refuse_arithmetic),
        ]

    def function(self, function: ir.BaseFunc) -> ir.BaseFunc:
        """The lowered function; the same object if nothing changes."""
        lowered = tvm_ffi.structural_mutate(function, self._callbacks)
        if isinstance(lowered, tirx.PrimFunc) and not lowered.same_as(function):
            # Made anew for its type, which is inferred from the parameters.
            return tirx.PrimFunc(lowered.params, lowered.body, lowered.ret_type, lowered.attrs, lowered.span)
        return lowered

    def _variable(self, var: ir.Var, mutator) -> ir.Var:
        if not isinstance(var.ty, ir.PrimType) or layout_of(var.ty.dtype) is None:
            return mutator.default_mutate(var)
        if var not in self._variables:
            self._variables[var] = tirx.Var(var.name, _storage_type(var.ty))
        return self._variables[var]


def _storage_type(ty: ir.PrimType) -> ir.PrimType:
    """uint8 with the same number of lanes for a QFP8 type, any other unchanged."""
    return ty if layout_of(ty.dtype) is None else ir.PrimType(with_lanes("uint8", int(ty.dtype.lanes)))


def _layout_of_type(ty: ir.Type) -> Layout | None:
    if isinstance(ty, ir.PrimType | relax.TensorType) and ty.dtype is not None:
        return layout_of(ty.dtype)
    if isinstance(ty, ir.TupleType | relax.TupleType):
        return next((layout for field in ty.fields if (layout := _layout_of_type(field)) is not None), None)
    return None


def _mentions_qfp8(function: ir.BaseFunc) -> bool:
    def look(node) -> tvm_ffi.VisitInterrupt | None:
        ty = node if isinstance(node, ir.PrimType) else node.ty
        found = isinstance(ty, ir.PrimType) and layout_of(ty.dtype) is not None
        return tvm_ffi.VisitInterrupt() if found else None

    return tvm_ffi.structural_walk(function, ((ir.PrimType, ir.Var, tirx.Cast), look)) is not None


def _constant(constant: ir.GenericConst, mutator) -> ir.GenericConst:
    if _layout_of_type(constant.ty) is None:
        return constant
    return relax.const(tensor_codes(constant.value))


def _once(value: tirx.Expr, use) -> tirx.Expr:
    """``use(value)`` with ``value`` evaluated once, however often ``use`` repeats it."""
    if isinstance(value, ir.Var | ir.TensorLoad):
        return use(value)
    name = tirx.Var("value", str(value.ty.dtype))
    return tirx.Let(name, value, use(name))


def _cast(cast: tirx.Cast, mutator) -> tirx.Expr:
    source, target = layout_of(cast.value.ty.dtype), layout_of(cast.ty.dtype)
    if source is None and target is None:
        return mutator.default_mutate(cast)
    value = mutator.mutate(cast.value)
    if source == target:
        return value
    if source is not None:
        # The grid values of most layouts fit int16; where the result is wider, int32 spares one conversion.
        wanted = str(cast.ty.dtype).split("x")[0]
        narrow = source.max_grid < 2**15 and wanted in ("int16", "float16")
        value = _once(value, lambda codes: decode_expr(codes, source, "int16" if narrow else "int32"))
    if target is None:
        return value.astype(str(cast.ty.dtype))
    layout = target
    number = value.astype(with_lanes("float32", lanes_of(value)))
    return _once(number, lambda v: encode_expr(v, layout))


def _call(call: ir.Call, mutator) -> ir.Call:
    values = [call, *call.args]
    layout = next((layout for v in values if (layout := _layout_of_type(v.ty)) is not None), None)
    lowered = mutator.default_mutate(call)
    if layout is None or not isinstance(call.op, ir.Op):
        return lowered
    name = call.op.name
    if name not in TAKES_CODES and name not in MOVES_VALUES:
        raise UnsupportedOperatorError(
            f"{name} cannot work on {layout.ir_dtype} values; cast them to float32 first"
        )
    if name in MOVES_VALUES and layout_of(call.ty.dtype) is not None:
        return tirx.call_intrin(_storage_type(call.ty), name, *lowered.args)
    return lowered


def _broadcast(broadcast: tirx.Broadcast, mutator) -> tirx.Broadcast:
    if layout_of(broadcast.ty.dtype) is None:
        return mutator.default_mutate(broadcast)
    return tirx.Broadcast(mutator.mutate(broadcast.value), broadcast.lanes)


def _select(select: tirx.Select, mutator) -> tirx.Select:
    if layout_of(select.ty.dtype) is None:
        return mutator.default_mutate(select)
    return tirx.Select(*map(mutator.mutate, (select.condition, select.true_value, select.false_value)))


def _refuse_arithmetic(node, mutator):
    layout = layout_of(node.a.ty.dtype)
    if layout is not None:
        raise UnsupportedOperatorError(
            f"TIR {type(node).__name__} cannot work on {layout.ir_dtype} values; cast them to float32 first"
        )
    return mutator.default_mutate(node)
