"""TVM's passes for kernels, from schedules to what machine code is made of, on all CPUs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import tvm
import tvm_ffi
from tvm import tirx
from tvm.s_tir.pipeline import default_s_tir_pipeline

from tvm_qfp8.host_cpu import usable_cores


def kernel_pipeline() -> tuple:
    """TVM's pipeline, and on the way to LLVM what keeps registers in registers."""
    lower, finish_host, finish_device = default_s_tir_pipeline()
    return lower, lambda: tvm.transform.Sequential([LocalsOnStack(), finish_host()]), finish_device


def pipeline_of_each_kernel() -> tuple:
    """The same in threads, for functions that all stay on the host."""
    lower, finish_host, finish_device = kernel_pipeline()
    return EachKernel(lower), lambda: EachKernel(finish_host()), finish_device


@tvm.transform.module_pass(opt_level=0, name="EachKernel")
class EachKernel:
    """Runs a pass over each function alone: a module's functions know nothing of each other."""

    def __init__(self, inner: tvm.transform.Pass) -> None:
        self.inner = inner

    def transform_module(self, mod: tvm.IRModule, context: tvm.transform.PassContext) -> tvm.IRModule:
        def lowered(function: tuple) -> tvm.IRModule:
            alone = tvm.IRModule(dict([function]), attrs=mod.attrs)
            with context:  # which is the thread's own
                return self.inner(alone)

        result = tvm.IRModule({}, attrs=mod.attrs)
        with ThreadPoolExecutor(usable_cores()) as threads:
            for one in threads.map(lowered, list(mod.functions_items())):
                result.update(one)
        return result


@tvm.transform.module_pass(opt_level=0, name="LocalsOnStack")
class LocalsOnStack:
    """Local buffers are variables of their function, which LLVM makes registers of.

    Without it TVM asks the allocator of workspaces for them: whoever frees memory might read it, so that every tile of
    sums is written there although nothing does.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        for var, function in list(mod.functions_items()):
            if isinstance(function, tirx.PrimFunc):
                mod[var] = tvm_ffi.structural_map(function, ((tirx.AllocBuffer, _on_stack),))
        return mod


def _on_stack(allocation: tirx.AllocBuffer) -> tirx.AllocBuffer:
    if allocation.buffer.scope() != "local":
        return allocation
    return tirx.AllocBuffer(
        allocation.buffer, annotations={"disable_lower_builtin": tirx.const(True, "bool")}
    )
