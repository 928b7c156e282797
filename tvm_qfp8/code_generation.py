"""From scheduled kernels to machine code, by TVM's passes."""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.s_tir.pipeline import default_s_tir_pipeline
from tvm.target import Target
from tvm.tirx import compilation_pipeline

GRAPHS = "relax.backend.use_cuda_graph"

PIPELINE = "tvm_qfp8"

LEFT_OUT = [
    "s_tir.HoistIfThenElse",
    "s_tir.InjectPermutedLayout",
    "s_tir.InjectVirtualThread",
    "s_tir.RenormalizeSplitPattern",
    "tirx.CommonSubexprElim",
]
"""Of TVM's pipeline, on the way to LLVM: half of the pipeline's time. LLVM finds common terms itself, virtual threads
and permuted layouts are for GPUs."""


def generate_code(scheduled: tvm.IRModule, target: Target) -> relax.VMExecutable:
    """The executable of a program, or of kernels alone."""
    compilation_pipeline.PIPELINE_MAP[PIPELINE] = _kernel_pipeline
    relax_pipeline = tvm.transform.Sequential(_executable_passes())
    on_gpu = target.kind.name == "cuda"
    with tvm.transform.PassContext(config={GRAPHS: on_gpu}, disabled_pass=[] if on_gpu else LEFT_OUT):
        return tvm.compile(scheduled, target=target, relax_pipeline=relax_pipeline, tir_pipeline=PIPELINE)


def _kernel_pipeline() -> tuple:
    """TVM's pipeline for kernels, and on the way to LLVM what keeps registers in registers."""
    lower, finish_host, finish_device = default_s_tir_pipeline()
    return lower, lambda: tvm.transform.Sequential([LocalsOnStack(), finish_host()]), finish_device


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


def _executable_passes() -> list:
    """TVM's own passes from scheduled kernels to an executable of the virtual machine."""
    return [
        relax.transform.RewriteDataflowReshape(),
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        # Does something where ``GRAPHS`` asks for it: kernels between inputs and outputs become one launch.
        relax.transform.RewriteCUDAGraph(),
        relax.transform.LowerAllocTensor(),
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    ]
