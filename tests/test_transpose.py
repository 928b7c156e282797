"""Matrices turned by tiles in registers."""

import numpy as np
import pytest
import tvm
from quantized_programs import run
from tvm import relax
from tvm.tirx import PrimFunc

from tvm_qfp8.code_generation import generate_code
from tvm_qfp8.relay_passes.schedule_rest import ScheduleRest
from tvm_qfp8.targets import cpu_features, isa, parse_target
from tvm_qfp8.topi.isa import instruction_set
from tvm_qfp8.topi.transpose import TransposeShape


@pytest.mark.parametrize(
    "shape, axes, expected",
    [
        ((1, 40, 40, 80), (0, 3, 1, 2), (1, 1600, 80)),
        ((2, 80, 40, 40), (0, 2, 3, 1), (2, 80, 1600)),
        ((3, 5, 7), (0, 2, 1), (3, 5, 7)),
        ((4, 1, 6, 1), (2, 3, 1, 0), (1, 4, 6)),  # axes of one place do not count
        ((2, 3, 4, 5, 6), (0, 1, 4, 2, 3), (6, 20, 6)),
        ((0, 3, 4), (0, 2, 1), (0, 3, 4)),
        ((2, 3, 0), (0, 2, 1), (2, 3, 0)),
        ((2, 3, 4), (0, 1, 2), None),  # nothing to turn
        ((2, 1, 4), (1, 0, 2), None),
        ((2, 3, 4), (1, 0, 2), None),  # rows that stay whole
        ((2, 3, 4), (2, 1, 0), None),
    ],
)
def test_which_transpositions_turn_matrices(shape, axes, expected):
    found = TransposeShape.of(shape, axes)
    assert found == (expected and TransposeShape(*expected))
    if found:
        x = np.arange(np.prod(shape)).reshape(shape)
        turned = x.reshape(found.outer, found.rows, found.columns).swapaxes(1, 2)
        assert (turned.reshape(-1) == x.transpose(axes).reshape(-1)).all()


@pytest.mark.parametrize("target", ["native", "x86-64-v3", "x86-64"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "int64"])
@pytest.mark.parametrize(
    "shape, axes",
    [
        ((1, 16, 16), [0, 2, 1]),
        ((2, 17, 9, 20), [0, 3, 1, 2]),  # tiles overlap
        ((3, 43, 150), [0, 2, 1]),
        ((1, 64, 64, 48), [0, 3, 1, 2]),  # in parallel
        ((1, 15, 130), [0, 2, 1]),  # too few rows where a vector has 16 lanes
        ((0, 16, 16), [0, 2, 1]),
        ((2, 16, 0), [0, 2, 1]),
        ((0, 16), [1, 0]),
    ],
)
def test_every_value_comes_to_its_place(shape, axes, dtype, threads, target):
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, dtype))
    with builder.function("main", [x]):
        with builder.dataflow():
            output = builder.emit_output(relax.op.permute_dims(x, axes))
        builder.emit_func_output(output)
    with parse_target(target) as parsed:
        instructions = instruction_set(isa(parsed), cpu_features(parsed))
        passes = [relax.transform.LegalizeOps(), ScheduleRest(instructions, threads)]
        scheduled = tvm.transform.Sequential(passes)(builder.get())
        executable = generate_code(scheduled, parsed)
    (function,) = (f for f in scheduled.functions.values() if isinstance(f, PrimFunc))
    turned = TransposeShape.of(shape, axes)
    fits = dtype != "int64" and min(turned.rows, turned.columns) >= instructions.lanes and turned.outer > 0
    assert ("Shuffle" in function.script()) == fits
    values = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    (found,) = run(executable, values)
    assert found.dtype == dtype and (found == values.transpose(axes)).all()
