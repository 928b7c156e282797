"""The tuning run: MetaSchedule proposes candidates, the machine times them, the log keeps every result.

Workloads take turns, the one with the most time to gain first, a batch of candidates a turn, so that a run that ends
early has tried something for each. The default schedule is always the first candidate. What the log holds already is
not measured again and costs no trial.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tvm.s_tir import meta_schedule as ms
from tvm.target import Target

from tvm_qfp8.topi.schedules import Decisions
from tvm_qfp8.tuning.logs import LogWriter, best_schedule
from tvm_qfp8.tuning.measure import LOST, Measurer
from tvm_qfp8.tuning.search import DecisionFeatures, candidate, read_decisions, tune_context
from tvm_qfp8.tuning.workload import Workload, kernel, quantized_layer

WARMUP_TRIALS = 48
"""Trials before the cost model takes part in the choice."""

SEARCH_SHARE = 0.75
"""The part of a limited time that is for the search; the rest is for timing the finalists."""

FINALISTS = 2
"""Candidates that are timed again, in turn with the default schedule, when a workload is done."""


@dataclass
class Progress:
    """The state of a run, after every measured candidate."""

    workload: Workload
    trials: int
    """Measured for this workload, by this run and earlier ones."""
    best: float
    """Seconds; infinite where nothing ran."""
    default: float
    """Seconds of the default schedule."""
    done: int
    """Candidates measured by this run, of all workloads."""
    total: int
    """Candidates that this run may measure."""
    seconds_left: float


@dataclass
class TuningResult:
    """What became of one workload."""

    workload: Workload
    trials: int
    default: float
    best: float
    decisions: Decisions
    failed: int
    calls: int
    """Calls of the kernel in one run of the models tuned for."""

    @property
    def gain(self) -> float:
        """How many times as fast as the default schedule, by the times of the log."""
        return self.default / self.best if 0 < self.best < float("inf") else 1.0


@dataclass
class _Task:
    workload: Workload
    calls: int
    log: dict[tuple, float]
    context: ms.TuneContext | None = None
    layer: object = None
    exhausted: bool = False
    fresh: bool = False
    """Something new was measured in this run."""
    default_items: tuple = field(init=False)

    def __post_init__(self) -> None:
        self.default_items = tuple(self.workload.default().items())

    @property
    def default(self) -> float:
        return self.log.get(self.default_items, float("inf"))

    @property
    def best(self) -> float:
        return min(self.log.values(), default=float("inf"))

    @property
    def winner(self) -> tuple:
        """The schedule that the log speaks for."""
        return best_schedule(self.log, self.default_items) if self.log else self.default_items

    @property
    def size(self) -> int:
        """Points of the space."""
        points = 1
        for candidates in self.workload.space().values():
            points *= len(candidates)
        return points


class Tuner:
    """Tunes workloads on one kind of machine.

    Parameters
    ----------
    target : tvm.target.Target
        A CPU.
    writer : LogWriter
        Where results go, and what is known already.
    measurer : Measurer
        Times kernels; local or on boards.
    trials : int
        Candidates per workload, those in the log included.
    minutes : float or None
        Stop after that time.
    seed : int
        Of the search; times are measured, so runs differ all the same.
    stop : callable
        Asked between batches; true ends the run.
    """

    def __init__(
        self,
        target: Target,
        writer: LogWriter,
        measurer: Measurer,
        *,
        trials: int,
        minutes: float | None = None,
        seed: int = 1,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.stop = stop
        self.target, self.writer, self.measurer = target, writer, measurer
        self.trials, self.minutes, self.seed = trials, minutes, seed
        self._features = DecisionFeatures()
        self._model = ms.cost_model.XGBModel(
            extractor=self._features, num_warmup_samples=WARMUP_TRIALS, num_tuning_cores=1
        )
        self._done = 0

    def run(
        self, workloads: Mapping[Workload, int], progress: Callable[[Progress], None] | None = None
    ) -> list[TuningResult]:
        """Tune; ``workloads`` with the number of calls of each. An interrupt (Ctrl-C) ends the run, not the process.

        Returns
        -------
        list of TuningResult
            For every workload, from this run and earlier ones.
        """
        tasks = [_Task(w, calls, self.writer.measured(w)) for w, calls in workloads.items()]
        self._report = progress or (lambda state: None)
        self._started = time.monotonic()
        self._total = sum(self._remaining(task) for task in tasks)
        try:
            # First every default: it ranks the workloads, and a run cut short still has something to compare with.
            for start in range(0, len(tasks), self.measurer.batch):
                waiting = tasks[start : start + self.measurer.batch]
                self._measure_defaults([t for t in waiting if t.default_items not in t.log])
            while self._in_time(SEARCH_SHARE):
                open_tasks = [t for t in tasks if self._remaining(t) > 0]
                if not open_tasks:
                    break
                for task in sorted(open_tasks, key=lambda t: -t.calls * min(t.best, 1e3)):
                    if self._in_time(SEARCH_SHARE):
                        self._turn(task)
            self._confirm([task for task in tasks if task.fresh and task.winner != task.default_items])
        except KeyboardInterrupt:
            self.interrupted = True
        return [self._result(task) for task in tasks]

    interrupted = False
    """Whether Ctrl-C ended the run."""

    def _remaining(self, task: _Task) -> int:
        return 0 if task.exhausted else max(0, min(self.trials, task.size) - len(task.log))

    def _in_time(self, share: float = 1.0) -> bool:
        if self.stop():
            raise KeyboardInterrupt
        return self.minutes is None or time.monotonic() - self._started < 60 * self.minutes * share

    def _measure_defaults(self, tasks: list[_Task]) -> None:
        if not tasks or not self._in_time():
            return
        candidates = [candidate(t.workload, t.workload.default()) for t in tasks]
        kernels = [self._kernel(t, t.workload.default()) for t in tasks]
        for task, found, seconds in zip(tasks, candidates, self.measurer.measure(kernels), strict=True):
            self._note(task, found, seconds)

    def _turn(self, task: _Task) -> None:
        """One batch of candidates of one workload."""
        if task.context is None:
            self._start(task)
        assert task.context is not None
        proposed = task.context.generate_measure_candidates()
        if proposed is None:
            task.exhausted = True
            return
        decisions = [read_decisions(c.sch) for c in proposed]
        known = [tuple(d.items()) in task.log for d in decisions]
        room = self._remaining(task)
        fresh = [i for i, old in enumerate(known) if not old][:room]
        kernels = [self._kernel(task, decisions[i]) for i in fresh]
        for i, seconds in zip(fresh, self.measurer.measure(kernels) if kernels else [], strict=True):
            self._note(task, proposed[i], seconds)
        measured = [
            (c, _runner_result(task.log[tuple(d.items())]))
            for c, d in zip(proposed, decisions, strict=True)
            if tuple(d.items()) in task.log
        ]
        new = [i for i in fresh if tuple(decisions[i].items()) in task.log]
        if new:
            results = [_runner_result(task.log[tuple(decisions[i].items())]) for i in new]
            self._model.update(task.context, [proposed[i] for i in new], results)
        task.context.notify_runner_results([c for c, _ in measured], [r for _, r in measured])

    def _start(self, task: _Task) -> None:
        """Open the search; the cost model learns from what the log holds."""
        task.context = tune_context(task.workload, self.target, self.seed)
        self._features.workloads[task.workload.key] = task.workload
        task.context.pre_tuning(
            1_000_000, self.measurer.batch, database=self.writer.database, cost_model=self._model
        )
        known = [(dict(items), s) for items, s in task.log.items() if task.workload.allows(dict(items))]
        self._model.update(
            task.context,
            [candidate(task.workload, d) for d, _ in known],
            [_runner_result(seconds) for _, seconds in known],
        )

    def _confirm(self, tasks: list[_Task]) -> None:
        """Time the default and the fastest candidates in turn; the least of many noisy times is too good."""
        per_call = max(1, self.measurer.batch // (FINALISTS + 1))
        for start in range(0, len(tasks), per_call):
            if not self._in_time():
                return
            pairs: list[tuple[_Task, Decisions]] = []
            for task in tasks[start : start + per_call]:
                ranked = sorted(task.log, key=lambda items: task.log[items])
                chosen = dict.fromkeys([*ranked[:FINALISTS], task.default_items])
                pairs += [(task, dict(items)) for items in chosen]
            times = self.measurer.measure([self._kernel(*pair) for pair in pairs], rounds=3)
            for (task, decisions), seconds in zip(pairs, times, strict=True):
                if seconds:
                    self.writer.commit(task.workload, candidate(task.workload, decisions), seconds)

    def _kernel(self, task: _Task, decisions: Decisions):
        if task.layer is None:
            task.layer = quantized_layer(task.workload)
        return kernel(task.workload, task.layer, decisions)

    def _note(self, task: _Task, found: ms.MeasureCandidate, seconds: list[float] | None) -> None:
        if seconds == LOST:
            return
        self.writer.commit(task.workload, found, seconds)
        self._done += 1
        task.fresh = True
        spent = time.monotonic() - self._started
        left = spent / self._done * max(0, self._total - self._done)
        if self.minutes is not None:
            left = min(left, 60 * self.minutes - spent)
        self._report(
            Progress(
                task.workload, len(task.log), task.best, task.default, self._done, self._total, max(0.0, left)
            )
        )

    def _result(self, task: _Task) -> TuningResult:
        items = task.winner
        failed = sum(seconds == float("inf") for seconds in task.log.values())
        best = task.log.get(items, float("inf"))
        return TuningResult(task.workload, len(task.log), task.default, best, dict(items), failed, task.calls)


def _runner_result(seconds: float) -> ms.runner.RunnerResult:
    if seconds == float("inf"):
        return ms.runner.RunnerResult(None, "failed")
    return ms.runner.RunnerResult([seconds], None)
