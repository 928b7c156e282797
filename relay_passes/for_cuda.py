"""The last pass for GPUs: remaining operators get a thread for each element, and floats are CUDA's.

Runs in the place of ``ScheduleRest``, after ``LegalizeOps``. Before::

    lv = R.call_tir(cls.transpose, (x,), ...)          # loops without a schedule
    T.call_llvm_intrin("llvm.arithmetic.fence", a * b)

After: dlight's ``Fallback`` binds loops to threads, sums staying in order, and products are ``__fmul_rn(a, b)``.
"""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.s_tir import dlight

from tvm_qfp8.relay_passes.schedule_rest import fence_products
from tvm_qfp8.topi.cuda.arithmetic import for_cuda


@tvm.transform.module_pass(opt_level=0, name="ForCuda")
class ForCuda:
    """Schedule what is left, and write every function's arithmetic for CUDA."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        for var, function in list(mod.functions_items()):
            if isinstance(function, tirx.PrimFunc) and not (
                function.attrs and "tirx.is_scheduled" in function.attrs
            ):
                mod[var] = fence_products(function)
        mod = dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(mod)
        for var, function in list(mod.functions_items()):
            if isinstance(function, tirx.PrimFunc):
                mod[var] = for_cuda(function)
        return mod
