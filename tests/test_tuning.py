"""The tuner's bookkeeping with a measurer of our own, and the logs: what is used, and what only warns."""

import json
import os
import warnings

import pytest
from test_schedules import SHAPES, native_workload

from tvm_qfp8.targets import parse_target
from tvm_qfp8.tuning import measure
from tvm_qfp8.tuning.logs import (
    MANIFEST,
    RECORDS,
    WORKLOADS,
    LoggedSchedules,
    LogWriter,
    best_schedule,
    log_folder,
    machine_key,
)
from tvm_qfp8.tuning.tuner import Tuner

TARGET = parse_target("native")


class CountingMeasurer:
    """Times that depend on nothing but the kernel's text; every ``failing``-th kernel fails."""

    batch = 8

    def __init__(self, failing=0, stop_after=None):
        self.measured, self.failing, self.stop_after = 0, failing, stop_after

    def measure(self, kernels, rounds=1):
        results = []
        for kernel in kernels:
            self.measured += 1
            if self.stop_after is not None and self.measured > self.stop_after:
                raise KeyboardInterrupt
            fails = self.failing and self.measured % self.failing == 0
            results.append(None if fails else [1e-6 * (1 + sum(kernel.script().encode()) % 97)])
        return results


@pytest.fixture
def workload():
    return native_workload(*SHAPES["some rows"])


def tune(root, workload, measurer, trials, **options):
    writer = LogWriter(root, TARGET)
    writer.write_manifest({}, [])
    tuner = Tuner(TARGET, writer, measurer, trials=trials, **options)
    return tuner, tuner.run({workload: 1})


def test_the_best_schedule_is_found_logged_and_used(tmp_path, workload):
    measurer = CountingMeasurer(failing=5)
    _, (result,) = tune(tmp_path, workload, measurer, 20)
    assert result.trials == 20 and result.failed >= 3
    assert result.best <= result.default
    chooser = LoggedSchedules(TARGET, [tmp_path])
    schedule = chooser(workload.schedules, workload.isa, workload.shape, 1)
    assert schedule == workload.schedules.from_decisions(result.decisions)
    assert list(chooser.used) == [workload.key]


def test_more_threads_take_the_tiles_of_one_and_share_as_by_default(log, workload):
    from dataclasses import replace

    two = replace(workload, threads=2)
    best, _ = choose(log.parent, workload)
    expected = best.decisions() | {"parallel_rows": two.default()["parallel_rows"]}
    schedule, caught = choose(log.parent, two)
    assert schedule.decisions() == expected and not caught


def test_records_of_one_thread_hold_however_threads_would_share(workload):
    decisions = workload.default()
    for shares in (0, 1):
        assert workload.allows(decisions | {"parallel_rows": shares})
    assert not workload.allows(decisions | {"parallel_rows": 2})
    assert not workload.allows(decisions | {"tile": -1})


@pytest.mark.parametrize("factor", [2, 5])
def test_other_rows_pack_weights_like_those_in_the_log(log, workload, factor):
    from dataclasses import replace

    more = replace(workload, shape=replace(workload.shape, rows=factor * workload.shape.rows + 1))
    best, _ = choose(log.parent, workload)
    schedule, caught = choose(log.parent, more)
    assert schedule.vectors == best.vectors and schedule.scratch_bytes == best.scratch_bytes and not caught
    assert schedule.tile_rows <= best.tile_rows
    assert schedule.parallel_rows == bool(more.default()["parallel_rows"])
    for rows in (0, 1, 6):  # another kernel, and no rows
        few = replace(workload, shape=replace(workload.shape, rows=rows))
        assert choose(log.parent, few)[0].decisions() == few.default()
    wider = replace(workload, shape=replace(workload.shape, columns=workload.shape.columns + 1))
    assert choose(log.parent, wider)[0].decisions() == wider.default()


def test_a_second_run_goes_on_where_the_first_ended(tmp_path, workload):
    tune(tmp_path, workload, CountingMeasurer(), 10)
    again = CountingMeasurer()
    _, (result,) = tune(tmp_path, workload, again, 10)
    assert again.measured == 0 and result.trials == 10
    more = CountingMeasurer()
    _, (result,) = tune(tmp_path, workload, more, 14)
    confirmations = 3
    assert result.trials == 14 and more.measured <= 4 + confirmations


def test_an_interrupt_keeps_what_was_measured(tmp_path, workload):
    tuner, (result,) = tune(tmp_path, workload, CountingMeasurer(stop_after=12), 40)
    # The default and a batch of eight, among which the search may have drawn it, too.
    assert tuner.interrupted and result.trials in (8, 9)
    _, (result,) = tune(tmp_path, workload, CountingMeasurer(), 16)
    assert result.trials == 16


def test_no_time_left_means_no_trials(tmp_path, workload):
    _, (result,) = tune(tmp_path, workload, CountingMeasurer(), 40, minutes=0.0)
    assert result.trials == 0 and result.decisions == workload.default()


def test_a_small_space_ends_the_run(tmp_path):
    workload = native_workload(*SHAPES["batch_matmul"])
    points = len(workload.space()["tile"]) * len(workload.space()["unroll"])
    _, (result,) = tune(tmp_path, workload, CountingMeasurer(), 10 * points)
    assert result.trials <= points


def test_noise_does_not_replace_the_default():
    fast, slow = (("unroll", 1),), (("unroll", 2),)
    assert best_schedule({fast: 1.0, slow: 2.0}, slow) == fast
    assert best_schedule({fast: 0.995, slow: 1.0}, slow) == slow


def choose(root, workload, target=TARGET, **options):
    """(chosen schedule, warnings)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chooser = LoggedSchedules(target, [root], **options)
        schedule = chooser(workload.schedules, workload.isa, workload.shape, workload.threads)
    return schedule, [str(w.message) for w in caught if "tuning log" in str(w.message)]


def default_of(workload):
    return workload.schedules.default(workload.isa, workload.shape, workload.threads)


@pytest.fixture
def log(tmp_path, workload):
    """A log whose best schedule is not the default."""
    writer = LogWriter(tmp_path, TARGET)
    writer.write_manifest({}, [])
    from tvm_qfp8.tuning.search import candidate

    other = workload.default() | {"unroll": 4}
    writer.commit(workload, candidate(workload, workload.default()), [2e-6])
    writer.commit(workload, candidate(workload, other), [1e-6])
    folder = log_folder(tmp_path, TARGET)
    assert choose(tmp_path, workload) == (workload.schedules.from_decisions(other), [])
    return folder


def test_a_missing_log_is_silent(tmp_path, workload):
    assert choose(tmp_path, workload) == (default_of(workload), [])


def test_a_missing_folder_warns(tmp_path, workload):
    schedule, messages = choose(tmp_path / "none", workload)
    assert schedule == default_of(workload) and "does not exist" in messages[0]


@pytest.mark.parametrize("name", [WORKLOADS, RECORDS])
@pytest.mark.parametrize("damage", [b"\xff\x00{", b"[0, [[]]]\n", b"[7, 1]\nnull\n{}\n"])
def test_a_damaged_log_warns(log, workload, name, damage):
    (log / name).write_bytes(damage)
    schedule, messages = choose(log.parent, workload)
    assert schedule == default_of(workload) and messages


def test_a_damaged_line_costs_only_itself(log, workload):
    path = log / RECORDS
    path.write_text(path.read_text() + '[0, [[["Get')
    schedule, messages = choose(log.parent, workload)
    assert schedule != default_of(workload) and "damaged" in messages[0]
    writer = LogWriter(log.parent, TARGET)
    assert len(writer.problems) == 1 and len(writer.measured(workload)) == 2
    assert choose(log.parent, workload)[1] == []


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"key": 1, "emulated": false}'])
def test_a_damaged_manifest_warns(log, workload, text):
    (log / MANIFEST).write_text(text)
    schedule, messages = choose(log.parent, workload)
    assert schedule == default_of(workload) and messages


def test_a_record_for_another_target_is_never_used(log, workload):
    other = parse_target("x86-64")
    assert choose(log.parent, workload, other) == (default_of(workload), [])
    # Not even in a folder of the right name.
    os.rename(log, log_folder(log.parent, other))
    schedule, messages = choose(log.parent, workload, other)
    assert schedule == default_of(workload) and "another machine" in messages[0]


def test_a_record_of_another_tvm_is_never_used(log, workload, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.99")
    assert machine_key(TARGET)["tvm"] == "0.99"
    assert choose(log.parent, workload) == (default_of(workload), [])


def test_an_emulated_log_is_never_used_for_a_real_machine(log, workload):
    manifest = json.loads((log / MANIFEST).read_text()) | {"emulated": True}
    (log / MANIFEST).write_text(json.dumps(manifest))
    schedule, messages = choose(log.parent, workload)
    assert schedule == default_of(workload) and messages
    os.rename(log, log_folder(log.parent, TARGET, emulated=True))
    assert choose(log.parent, workload) == (default_of(workload), [])
    assert choose(log.parent, workload, emulated=True)[0] != default_of(workload)


def broken_kernel(kind):
    import tvm
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def abort(a: T.Buffer((4,), "float32")):
        T.evaluate(T.call_extern("int32", "abort"))

    @T.prim_func(s_tir=True)
    def sleep(a: T.Buffer((4,), "float32")):
        T.evaluate(T.call_extern("int32", "sleep", T.int32(1000)))

    @T.prim_func(s_tir=True)
    def missing(a: T.Buffer((4,), "float32")):
        T.evaluate(T.call_extern("int32", "no_such_function"))

    @T.prim_func(s_tir=True)
    def good(a: T.Buffer((4,), "float32")):
        a[0] = T.float32(1)

    function = {"abort": abort, "sleep": sleep, "missing": missing, "good": good}[kind]
    return tvm.IRModule({"main": function.with_attr("global_symbol", "main")})


@pytest.mark.slow
def test_a_candidate_that_crashes_or_hangs_fails_alone(monkeypatch):
    monkeypatch.setattr(measure, "RUN_SECONDS", 5.0)
    measurer = measure.LocalMeasurer(TARGET, 1)
    results = measurer.measure([broken_kernel(k) for k in ("good", "abort", "sleep", "missing", "good")])
    assert [bool(r) for r in results] == [True, False, False, False, True]
