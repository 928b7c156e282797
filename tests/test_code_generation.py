"""What TVM makes of kernels on the way to LLVM."""

import numpy as np
import pytest
import tvm
from elftools.elf.elffile import ELFFile
from tvm import s_tir, tirx

from tvm_qfp8 import code_generation
from tvm_qfp8.code_generation import LEFT_OUT, generate_code
from tvm_qfp8.format import get_layout
from tvm_qfp8.kernel_pipeline import EachKernel
from tvm_qfp8.linker import linker
from tvm_qfp8.tables import build_table
from tvm_qfp8.targets import cpu_features, isa, parse_target
from tvm_qfp8.topi.codec import encode_expr
from tvm_qfp8.topi.interpolate import emit_table
from tvm_qfp8.topi.isa import instruction_set
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, keep, load, store

TARGETS = ["x86-64", "x86-64-v3", "x86-64-v4", "aarch64"]
WORKSPACE = "TVMBackendAllocWorkspace"


def table_and_codes(name: str, vectors: int = 4) -> tvm.IRModule:
    """A kernel that puts vectors through a table and encodes them, each kept on its way."""
    target = parse_target(name)
    instructions = instruction_set(isa(target), cpu_features(target))
    table = build_table("silu", max_error=1e-3)

    def body(x, codes) -> None:
        for at in range(0, vectors * 16, 16):
            value = keep(emit_table(table, load(x, at, 16), instructions))
            store(codes, at, encode_expr(value, get_layout("E2M5"), instructions), 16)

    specs = [TensorSpec((vectors * 16,), dtype) for dtype in ("float32", "uint8")]
    return tvm.IRModule({"main": build_prim_func("main", specs, body)})


@pytest.mark.parametrize("name", TARGETS)
def test_local_buffers_are_no_workspaces(name):
    kernel, target = table_and_codes(name), parse_target(name)
    assert WORKSPACE in tvm.compile(kernel, target=target).mod.inspect_source("asm")
    assert WORKSPACE not in generate_code(kernel, target).mod.inspect_source("asm")


@pytest.mark.parametrize("name", TARGETS)
def test_no_intrinsic_counts_as_pure(name):
    text = table_and_codes(name).script()
    assert "call_llvm_intrin" in text
    assert "call_llvm_pure_intrin" not in text


def test_both_ways_give_the_same_codes():
    kernel, target = table_and_codes("native"), parse_target("native")
    x = tvm.runtime.tensor(np.random.default_rng(0).standard_normal(64).astype(np.float32) * 8)
    found = []
    for executable in (generate_code(kernel, target), tvm.compile(kernel, target=target)):
        codes = tvm.runtime.tensor(np.zeros(64, np.uint8))
        executable.mod["main"](x, codes)
        found.append(codes.numpy())
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("name", ["native", "aarch64", "armv7", "riscv64"])
def test_libraries_carry_no_debug_information(name, tmp_path):
    if name != "native":
        pytest.importorskip("ziglang", reason="ziglang is not installed; pip install 'tvm-qfp8[board]'")
    target, path = parse_target(name), tmp_path / "kernel.so"
    generate_code(table_and_codes(name), target).export_library(str(path), fcompile=linker(target))
    with path.open("rb") as file:
        sections = [section.name for section in ELFFile(file).iter_sections()]
    assert ".dynsym" in sections
    assert not [section for section in sections if section.startswith(".debug")]


def test_passes_that_are_left_out_are_those_that_tvm_has():
    passes = [
        s_tir.transform.HoistIfThenElse(),
        s_tir.transform.InjectPermutedLayout(),
        s_tir.transform.InjectVirtualThread(),
        s_tir.transform.RenormalizeSplitPattern(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.CommonSubexprElim(),
    ]
    assert [one.info.name for one in passes] == LEFT_OUT


def test_kernels_that_are_lowered_alone_become_the_same_code(monkeypatch):
    target = parse_target("x86-64-v3")
    kernels = {
        name: table_and_codes("x86-64-v3", vectors)["main"].with_attr("global_symbol", name)
        for name, vectors in (("one", 1), ("two", 2), ("three", 3))
    }
    found = []
    for pipeline in (code_generation.pipeline_of_each_kernel, code_generation.kernel_pipeline):
        monkeypatch.setattr(code_generation, "pipeline_of_each_kernel", pipeline)
        found.append(generate_code(tvm.IRModule(kernels), target).mod.inspect_source("asm"))
    assert found[0] == found[1]


def test_what_a_pass_refuses_is_raised_from_its_thread():
    @tvm.transform.module_pass(opt_level=0, name="Refuses")
    def refuses(mod, _context):
        raise ValueError(f"{len(mod.functions_items())} function")

    with pytest.raises(ValueError, match="1 function"):
        EachKernel(refuses)(table_and_codes("x86-64"))
