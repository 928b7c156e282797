"""The loop schedule of operators that no kernel of ours covers."""

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.tirx import ForKind, PrimFunc

from tvm_qfp8.code_generation import generate_code
from tvm_qfp8.relay_passes.schedule_rest import MIN_PARALLEL_ELEMENTS, ScheduleRest
from tvm_qfp8.targets import parse_target
from tvm_qfp8.topi.isa import instruction_set

ISA = instruction_set("avx2")


def program(shape, operator):
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            output = builder.emit_output(operator(x))
        builder.emit_func_output(output)
    return builder.get()


def transposition(shape, axes):
    return program(shape, lambda x: relax.op.permute_dims(x, axes))


def loops_of(scheduled):
    """The loops around the one block of the one function."""
    schedule = tvm.s_tir.Schedule(next(f for f in scheduled.functions.values() if isinstance(f, PrimFunc)))
    (block,) = schedule.get_child_blocks(schedule.get_sblock("root"))
    return [schedule.get(loop) for loop in schedule.get_loops(block)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "shape, axes, loops",
    [
        ((64, 32, 48), [2, 1, 0], 5),  # a tile has two loops more
        ((17, 9, 20), [2, 1, 0], 5),  # of extents that tiles do not divide
        ((1, 7, 130), [0, 2, 1], 4),  # too few rows for the kernel
        ((1, 9, 4, 16), [0, 2, 1, 3], 4),  # rows stay whole: no tiles, vectors only
    ],
)
def test_transpositions_go_by_tiles(shape, axes, loops, threads):
    target = parse_target("llvm")
    passes = tvm.transform.Sequential([relax.transform.LegalizeOps(), ScheduleRest(ISA, threads)])
    with target:
        scheduled = passes(transposition(shape, axes))
        executable = generate_code(scheduled, target)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x))
    assert (found.numpy() == x.transpose(axes)).all()
    found_loops = loops_of(scheduled)
    if threads == 1:
        assert len(found_loops) == loops
    assert (found_loops[0].kind == ForKind.PARALLEL) == (threads > 1 and x.size >= MIN_PARALLEL_ELEMENTS)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(2, 0, 9, 16), (0, 3, 4), (5, 16, 0)])
def test_what_is_empty_needs_no_schedule(shape, threads):
    passes = tvm.transform.Sequential([relax.transform.LegalizeOps(), ScheduleRest(ISA, threads)])
    with parse_target("llvm") as target:
        scheduled = passes(transposition(shape, [*range(len(shape))][::-1]))
        executable = generate_code(scheduled, target)
    found = relax.VirtualMachine(executable, tvm.cpu())["main"](
        tvm.runtime.tensor(np.empty(shape, np.float32))
    )
    assert found.shape == shape[::-1]


@pytest.mark.parametrize(
    "shape, turns",
    [
        ((1, 64, 32, 48), 64),  # what is inside of a turn stays a nest of loops
        ((2, 4, 100, 96), 800),
        ((1, 8, 8191), None),  # too little: no vector divides its rows
        ((1, 8, 8193), 8 * 8193),
    ],
)
def test_of_the_loops_only_as_many_are_parallel_as_give_each_thread_enough(shape, turns):
    passes = tvm.transform.Sequential([relax.transform.LegalizeOps(), ScheduleRest(ISA, 2)])
    with parse_target("llvm"):
        first = loops_of(passes(program(shape, relax.op.negative)))[0]
    assert (first.kind == ForKind.PARALLEL) == (turns is not None)
    assert turns is None or int(first.extent) == turns
