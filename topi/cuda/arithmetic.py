"""Float arithmetic of kernels as CUDA spells it, with the bits of the CPU.

``llvm.arithmetic.fence`` keeps a product out of a fused multiply-add; in CUDA C that is ``__fmul_rn``, likewise sums.
``llvm.fma`` is ``__fmaf_rn``.
TVM's ``max(a, b)`` is ``a > b ? a : b`` on CPUs, where CUDA's loses a NaN, so it is written out.
"""

from __future__ import annotations

import tvm_ffi
from tvm import ir, tirx
from tvm.backend.cuda.op import cuda_func_call
from tvm.target import codegen

# Functions, not selections: TVM's simplifier would follow both operands of each, in exponential time.
_EXTREMES = {
    kind: (
        name,
        f"\n__forceinline__ __device__ float {name}(float a, float b) {{ return a {sign} b ? a : b; }}\n",
    )
    for kind, name, sign in ((tirx.Max, "qfp8_max", ">"), (tirx.Min, "qfp8_min", "<"))
}
_ROUNDED = {tirx.Mul: "__fmul_rn", tirx.Add: "__fadd_rn", tirx.Sub: "__fsub_rn"}


def for_cuda(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The same function without LLVM's intrinsics."""

    def unfence(node):
        if not isinstance(node.op, ir.Op) or node.op.name != "tirx.call_llvm_intrin":
            return node
        if codegen.llvm_get_intrinsic_name(int(node.args[0])) == "llvm.fma":
            return tirx.call_pure_extern("float32", "__fmaf_rn", *node.args[1:])
        value = node.args[-1]
        name = _ROUNDED.get(type(value))
        return value if name is None else tirx.call_pure_extern("float32", name, value.a, value.b)

    def extreme(node):
        if not str(node.ty.dtype).startswith("float"):
            return node
        name, source = _EXTREMES[type(node)]
        return cuda_func_call(name, node.a, node.b, source_code=source, return_type="float32")

    return tvm_ffi.structural_map(function, ((ir.Call, unfence), ((tirx.Max, tirx.Min), extreme)))
