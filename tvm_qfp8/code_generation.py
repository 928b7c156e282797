"""From scheduled kernels to machine code, by TVM's passes."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.target import Target
from tvm.tirx import compilation_pipeline

from tvm_qfp8.kernel_pipeline import kernel_pipeline, pipeline_of_each_kernel

GRAPHS = "relax.backend.use_cuda_graph"

PIPELINE = "tvm_qfp8"

LEFT_OUT = [
    "s_tir.HoistIfThenElse",
    "s_tir.InjectPermutedLayout",
    "s_tir.InjectVirtualThread",
    "s_tir.RenormalizeSplitPattern",
    "tirx.AnnotateEntryFunc",
    "tirx.CommonSubexprElim",
]
"""Of TVM's pipeline, on the way to LLVM: half of the pipeline's time. LLVM finds common terms itself, virtual threads
and permuted layouts are for GPUs. A kernel that is lowered alone is not the module's entry."""


def generate_code(scheduled: tvm.IRModule, target: Target) -> relax.VMExecutable:
    """The executable of a program, or of kernels alone."""
    on_gpu = target.kind.name == "cuda"
    compilation_pipeline.PIPELINE_MAP[PIPELINE] = kernel_pipeline if on_gpu else pipeline_of_each_kernel
    relax_pipeline = tvm.transform.Sequential(_executable_passes())
    with tvm.transform.PassContext(config={GRAPHS: on_gpu}, disabled_pass=[] if on_gpu else LEFT_OUT):
        return tvm.compile(scheduled, target=target, relax_pipeline=relax_pipeline, tir_pipeline=PIPELINE)


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
