"""Hopper's tensor cores, four warps together: run by the emulator, and, with such a GPU, on it."""

import numpy as np
import pytest
import tvm
from cuda_emulator import cuda_source, run_kernel
from test_cuda import NEEDS_COMPILER, NEEDS_NVCC, conv, kernel_of, on_gpu, operands

from tvm_qfp8 import cuda_code
from tvm_qfp8.topi import reference
from tvm_qfp8.topi.cuda.conv_plan import (
    ConvPlan,
    GroupPlan,
    GroupTile,
    IntegerGroupPlan,
    pack_weights,
    plan_conv,
)
from tvm_qfp8.topi.cuda.integer_gemm import emit_integer_conv, pack_integers
from tvm_qfp8.topi.cuda.warpgroup_gemm import emit_group_conv, pack_for_groups

NEEDS_HOPPER = pytest.mark.skipif(
    not (tvm.runtime.enabled("cuda") and tvm.cuda(0).exist and tvm.cuda(0).compute_version == "9.0"),
    reason="this machine has no GPU of compute capability 9.0",
)
HOPPER = {
    "ragged, totals after every run": conv(1, 70, 96, 72),
    "3x3, stride, padding": conv(9, 7, 32, 70, (3, 3), (2, 1), (1, 0, 1, 2), activation="E2M5"),
    "totals at times": conv(1, 300, 2048, 200, activation="E2M5"),
    "one block": conv(1, 130, 256, 136, activation="E2M5"),
    "int8": conv(1, 140, 656, 136, activation="E1M6", weight="E1M6"),
    "uint8, 3x3, stride, padding": conv(
        9, 7, 48, 70, (3, 3), (2, 1), (1, 0, 1, 2), activation="UE1M7", weight="E1M6"
    ),
}


def group_kernel(shape):
    """The same on Hopper's tensor cores."""
    x, codes = operands(shape)
    plan = plan_conv(shape, codes, hopper=True)
    assert isinstance(plan, GroupPlan)
    if isinstance(plan, IntegerGroupPlan):
        packed, emit = pack_integers(pack_weights(codes, plan.depth)), emit_integer_conv
    else:
        packed, emit = pack_for_groups(pack_weights(codes, plan.depth)), emit_group_conv
    function = kernel_of(lambda *a: emit(plan, *a), x, packed, shape.out_channels, plan.rows)
    return function, x, packed, reference.conv2d(x, codes, shape).reshape(plan.rows, -1)


@NEEDS_COMPILER
@pytest.mark.parametrize("name", HOPPER)
@pytest.mark.parametrize("tile", [GroupTile(1, 64), GroupTile(2, 128)], ids=str)
def test_convolution_by_groups_of_warps(name, tile, tmp_path, monkeypatch):
    monkeypatch.setattr("tvm_qfp8.topi.cuda.conv_plan.GROUP_TILES", (tile,))
    function, x, packed, expected = group_kernel(HOPPER[name])
    found = np.zeros(expected.shape, np.float32)
    run_kernel(function, [x, packed, found], tmp_path)
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@NEEDS_NVCC
@pytest.mark.parametrize("name, product", [("one block", "k16.f32.f16.f16"), ("int8", "k32.s32.s8.s8")])
def test_groups_of_warps_compile_to_machine_code(name, product):
    source = cuda_source(group_kernel(HOPPER[name])[0])
    assembly = cuda_code.compile_cuda(source, "sm_90a", "ptx").decode()
    assert "wgmma.mma_async.sync.aligned.m64n" in assembly and product in assembly
    assert cuda_code.compile_cuda(source, "sm_90a", "cubin")[:4] == b"\x7fELF"


def test_which_convolutions_go_by_groups():
    for channels, expected in ((24, ConvPlan), (32, GroupPlan)):
        shape = conv(1, 9, channels, 16, activation="E2M5")
        assert type(plan_conv(shape, operands(shape)[1], hopper=True)) is expected
    shape = conv(1, 33, 64, 35, activation="UE3M5")  # not even 64 products are exact
    codes = np.full((35, 1, 1, 64), 0x7F, np.uint8)
    assert plan_conv(shape, codes) is None and plan_conv(shape, codes, hopper=True) is None


@pytest.mark.gpu
@NEEDS_HOPPER
@pytest.mark.parametrize("name", HOPPER)
@pytest.mark.parametrize("tile", [GroupTile(1, 64), GroupTile(2, 64), GroupTile(2, 128)], ids=str)
def test_convolution_by_groups_of_warps_on_a_gpu(name, tile, monkeypatch):
    monkeypatch.setattr("tvm_qfp8.topi.cuda.conv_plan.GROUP_TILES", (tile,))
    function, x, packed, expected = group_kernel(HOPPER[name])
    np.testing.assert_array_equal(on_gpu(function, x, packed, expected.shape), expected.astype(np.float32))
