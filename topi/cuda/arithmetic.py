"""Float arithmetic of kernels as CUDA spells it, with the bits of the CPU.

``llvm.arithmetic.fence`` keeps a product out of a fused multiply-add; in CUDA C that is ``__fmul_rn``, likewise sums.
TVM's ``max(a, b)`` is ``a > b ? a : b`` on CPUs, where CUDA's loses a NaN, so it is written out.
"""

from __future__ import annotations

import tvm_ffi
from tvm import tirx

_ROUNDED = {tirx.Mul: "__fmul_rn", tirx.Add: "__fadd_rn", tirx.Sub: "__fsub_rn"}


def for_cuda(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The same function without LLVM's intrinsics."""

    def unfence(node):
        if node.op.name != "tirx.call_llvm_pure_intrin":
            return node
        value = node.args[-1]
        name = _ROUNDED.get(type(value))
        return value if name is None else tirx.call_pure_extern("float32", name, value.a, value.b)

    def select(node):
        if not str(node.ty.dtype).startswith("float"):
            return node
        first = node.a > node.b if isinstance(node, tirx.Max) else node.a < node.b
        return tirx.Select(first, node.a, node.b)

    return tvm_ffi.structural_map(function, (tirx.Call, unfence), (tirx.Max, select), (tirx.Min, select))
