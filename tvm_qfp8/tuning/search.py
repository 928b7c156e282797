"""The design space as MetaSchedule explores it.

The kernels are written by explicit loops, not by loop transformations. So a candidate's trace samples the decisions of
its schedule (``sample_categorical``) and annotates them on the template's block; what is measured is the kernel that
those decisions write. Evolutionary search, cost model, traces and database are MetaSchedule's own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms

from tvm_qfp8.topi.schedules import Decisions
from tvm_qfp8.tuning.workload import BLOCK, FAMILIES, Workload, template


def sample(schedule: Schedule, workload: Workload, decisions: Mapping[str, int] | None = None) -> Schedule:
    """Sample every decision of the workload's space, or take the given ones, and annotate them."""
    block = schedule.get_sblock(BLOCK)
    for name, candidates in workload.space().items():
        index = None if decisions is None else candidates.index(decisions[name])
        chance = [1.0 / len(candidates)] * len(candidates)
        schedule.annotate(block, name, schedule.sample_categorical(list(candidates), chance, index))
    return schedule


def read_decisions(schedule: Schedule) -> Decisions:
    """The decisions annotated on a schedule of a template."""
    block = schedule.get(schedule.get_sblock(BLOCK))
    return {str(name): int(value) for name, value in block.annotations.items()}


def candidate(workload: Workload, decisions: Mapping[str, int]) -> ms.MeasureCandidate:
    """The candidate of given decisions."""
    return ms.MeasureCandidate(sample(Schedule(template(workload)), workload, decisions), [])


@derived_object
class MutateDecision(ms.mutator.PyMutator):
    """Change one sampled decision to another of its candidates."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.random = random.Random(seed)

    def _initialize_with_tune_context(self, context: ms.TuneContext) -> None:
        pass

    def apply(self, trace: Any, *_: Any) -> Any:
        choices = [i for i in trace.insts if i.kind.name == "SampleCategorical" and len(i.attrs[0]) > 1]
        if not choices:
            return None
        chosen = self.random.choice(choices)
        count, now = len(chosen.attrs[0]), int(trace.get_decision(chosen))
        other = (now + 1 + self.random.randrange(count - 1)) % count
        return trace.with_decision(chosen, other, remove_postproc=True)

    def clone(self) -> MutateDecision:
        return MutateDecision(self.random.randrange(1 << 30))


_TILES = ("tile_rows", "vectors", "tile_pixels")
_SIZES = ("scratch_bytes", "slab_bytes")
_SWITCHES = ("register_decode", "rows_outer", "parallel_rows", "channels_outer", "unroll")


def features(workload: Workload, decisions: Decisions) -> np.ndarray:
    """One row of float64 for the cost model, of equal length for all families: shape, decisions, what follows."""
    schedule = workload.schedules.from_decisions(decisions)
    shape = workload.shape
    rows = getattr(shape, "rows", 0) or shape.out_width
    columns = getattr(shape, "columns", 0) or shape.out_channels // shape.groups
    tile_rows = getattr(schedule, "tile_rows", 0) or schedule.tile_pixels
    vectors = getattr(schedule, "vectors", 1)
    width = vectors * workload.isa.lanes
    row = [float(workload.family == family) for family in FAMILIES]
    row += [math.log2(workload.macs), math.log2(rows), math.log2(columns), float(workload.threads)]
    row += [float(getattr(schedule, name, 0)) for name in (*_TILES, *_SWITCHES)]
    row += [math.log2(max(1, getattr(schedule, name, 1))) for name in _SIZES]
    row += [
        tile_rows * vectors,  # accumulators
        (tile_rows + vectors) / (tile_rows * vectors),  # loads for each multiply-add
        -(-rows // tile_rows) * tile_rows / rows,  # what the last tile computes twice
        -(-columns // width) * width / columns,
    ]
    return np.array([row])


@derived_object
class DecisionFeatures(ms.feature_extractor.PyFeatureExtractor):
    """Features of a candidate from its decisions: the template's loops would tell the cost model nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.workloads: dict[str, Workload] = {}

    def extract_from(self, context: ms.TuneContext, candidates: list[ms.MeasureCandidate]) -> list:
        workload = self.workloads[context.task_name]
        return [tvm.runtime.tensor(features(workload, read_decisions(c.sch))) for c in candidates]


def tune_context(workload: Workload, target: tvm.target.Target, seed: int) -> ms.TuneContext:
    """Evolutionary search over the workload's space; the task's name is the workload's key."""

    def space(schedule: Schedule) -> None:
        sample(schedule, workload)

    return ms.TuneContext(
        template(workload),
        target=target,
        space_generator=ms.space_generator.ScheduleFn(
            space, sch_rules=[], postprocs=[], mutator_probs={MutateDecision(seed): 1.0}
        ),
        # Spaces hold some hundred points, so small populations suffice.
        search_strategy=ms.search_strategy.EvolutionarySearch(
            population_size=64, init_min_unmeasured=16, genetic_num_iters=3
        ),
        task_name=workload.key,
        rand_state=seed,
        num_threads=1,
    )
