"""Products of activations read and write heads where they lie, between tokens and values."""

import numpy as np
import pytest
from cuda_emulator import run_program
from models import heads
from quantized_programs import (
    RUNS,
    TARGETS,
    TILES,
    WITHOUT_TILES,
    build,
    machine_runs,
    program,
    random_codes,
    run,
)
from test_cuda import NEEDS_COMPILER
from test_cuda_modules import lowered_for_cuda
from tvm.relax import op as R

import tvm_qfp8
from tvm_qfp8.format import get_layout
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.fold_heads import SWAPPED, FoldHeads
from tvm_qfp8.relay_passes.fuse import op_name
from tvm_qfp8.topi import reference
from tvm_qfp8.topi.batch_matmul import BatchMatmulShape

ON_TILES = [
    pytest.param("tiles", marks=pytest.mark.skipif(not machine_runs(TILES), reason="no tile registers"))
]


def swapped(array):
    return np.ascontiguousarray(array.swapaxes(1, 2))


@pytest.mark.parametrize("isa", [*RUNS, *ON_TILES])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("inside", [(True, True, True), (True, False, False), (False, True, True)])
@pytest.mark.parametrize("threads, rows, columns, depth", [(1, 5, 7, 9), (2, 70, 33, 64)])
def test_a_product_is_its_twin(isa, threads, transpose, inside, rows, columns, depth):
    rng = np.random.default_rng(depth)
    x = random_codes(rng, (2, 3, rows, depth))
    y = random_codes(rng, (2, 3, columns, depth) if transpose else (2, 3, depth, columns))
    shape = BatchMatmulShape(6, rows, columns, depth, get_layout("UE2M6"), get_layout("E2M5"), transpose)
    expected = reference.batch_matmul(x, y, shape) * np.float32(0.25)
    given = [swapped(codes) if own else codes for codes, own in zip((x, y), inside, strict=False)]

    def emit(builder, *operands):
        a, b = (
            builder.emit(R.permute_dims(codes, SWAPPED)) if own else codes
            for codes, own in zip(operands, inside, strict=False)
        )
        product = builder.emit(qfp8_ops.batch_matmul(a, b, 0.25, transpose_y=transpose))
        return R.permute_dims(product, SWAPPED) if inside[2] else product

    layouts = ("UE2M6", "E2M5")
    mod = FoldHeads()(program([(c.shape, layout) for c, layout in zip(given, layouts, strict=True)], emit))
    values = [binding.value for block in mod["main"].body.blocks for binding in block.bindings]
    (product,) = (value for value in values if op_name(value) == "relax.qfp8.batch_matmul")
    assert tuple(bool(product.attrs[name]) for name in qfp8_ops.HEADS_INSIDE) == inside
    assert op_name(values[-1]) != "relax.permute_dims"  # nothing is moved after it
    (found,) = run(build(mod, TARGETS.get(isa, TILES), threads), *given)
    np.testing.assert_array_equal(found, swapped(expected) if inside[2] else expected)


def test_a_result_that_others_read_is_not_moved():
    def emit(builder, x, y):
        product = builder.emit(qfp8_ops.batch_matmul(x, y, 0.25, transpose_y=True))
        return R.add(product, builder.emit(R.permute_dims(product, SWAPPED)))

    x = random_codes(np.random.default_rng(0), (2, 4, 4, 8))
    mod = FoldHeads()(program([(x.shape, "E2M5")] * 2, emit))
    shape = BatchMatmulShape(8, 4, 4, 8, get_layout("E2M5"), get_layout("E2M5"), True)
    product = reference.batch_matmul(x, x, shape) * np.float32(0.25)
    (found,) = run(build(mod, WITHOUT_TILES), x, x)
    np.testing.assert_array_equal(found, product + product.swapaxes(1, 2))


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize("calibrated", [True, False])
def test_heads_are_read_where_they_lie(calibrated, tmp_path):
    inputs = [{"x": np.random.default_rng(i).standard_normal((1, 5, 16), np.float32)} for i in range(3)]
    calibration = inputs if calibrated else None
    lowered = lowered_for_cuda(heads((1, 5, 16)), calibration)
    names = [var.name_hint for var in lowered.get_global_vars()]
    assert not any(name.startswith("transpose") for name in names)
    here = tvm_qfp8.compile(heads((1, 5, 16)), "native", calibration=calibration)
    (found,) = run_program(lowered, [inputs[0]["x"]], tmp_path)
    np.testing.assert_array_equal(found, here.run(inputs[0])[0])
