"""A whole tuning run: opens the log, measures here or on boards, shows progress, writes the manifest."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from tvm.target import Target

from tvm_qfp8.errors import TuningError
from tvm_qfp8.host_cpu import host_cpu, usable_cores
from tvm_qfp8.tuning.interrupt import deferred_interrupt
from tvm_qfp8.tuning.logs import LogWriter, machine_key
from tvm_qfp8.tuning.measure import LocalMeasurer, Measurer
from tvm_qfp8.tuning.tuner import Progress, Tuner, TuningResult
from tvm_qfp8.tuning.workload import Workload


@dataclass
class Session:
    """What a tuning run leaves behind."""

    results: list[TuningResult]
    folder: Path
    interrupted: bool
    emulated: bool


def tune_workloads(
    workloads: Mapping[Workload, int],
    target: Target,
    logs: str | os.PathLike,
    *,
    trials: int,
    minutes: float | None = None,
    tracker: str | None = None,
    key: str | None = None,
    quiet: bool = False,
) -> Session:
    """Tune workloads (with their numbers of calls) for a target.

    Parameters
    ----------
    logs : path
        Root of the logs; the target has a folder of its own there.
    trials : int
        Candidates per workload, those in the log included.
    minutes : float
        Stop after that time.
    tracker, key : str
        ``HOST:PORT`` of an RPC tracker and the key of its boards; without them this machine measures.

    Raises
    ------
    TuningError
        The target is another machine's and no tracker is given, no board answers, or the log cannot be written.
    """
    with deferred_interrupt() as stop:
        measurer, machine, emulated = _measurer(target, tracker, key)
        try:
            writer = LogWriter(logs, target, emulated)
        except OSError as error:
            raise TuningError(
                f"cannot write the log below {logs}: {error.strerror}; name a folder with --logs"
            ) from error
        console = Console(stderr=True, quiet=quiet)
        if writer.problems:
            console.print(
                f"damaged log: {writer.problems[0]} ({len(writer.problems)} problems); the rest is kept",
                markup=False,
            )
        writer.write_manifest(machine, [])
        tuner = Tuner(target, writer, measurer, trials=trials, minutes=minutes, stop=stop)
        with _Bar(console, quiet) as bar:
            results = tuner.run(workloads, bar.show)
        writer.write_manifest(machine, [entry(result) for result in results if result.trials])
        return Session(results, writer.folder, tuner.interrupted, emulated)


def _measurer(target: Target, tracker: str | None, key: str | None) -> tuple[Measurer, dict[str, Any], bool]:
    if tracker is not None and key is not None:
        from tvm_qfp8.tuning.remote import RemoteMeasurer

        remote = RemoteMeasurer(target, tracker, key)
        return remote, {"boards": key, "tracker": tracker}, remote.emulated
    own, asked = machine_key(Target(host_cpu())), machine_key(target)
    missing = sorted(set(asked["features"]) - set(own["features"]))
    if asked["architecture"] != own["architecture"] or missing:
        raise TuningError(
            f"this machine ({own['architecture']} {own['cpu']}) cannot time kernels for {asked['architecture']} "
            f"{asked['cpu'] or missing[0]}; measure on a board with --tracker HOST:PORT --key NAME"
        )
    machine = {"cpu": host_cpu()["mcpu"], "system": platform.platform(), "cores": usable_cores()}
    return LocalMeasurer(target, usable_cores()), machine, False


def entry(result: TuningResult) -> dict[str, Any]:
    """A result as it stands in manifests and result files."""
    return {
        "workload": str(result.workload),
        "trials": result.trials,
        "failed": result.failed,
        "default_us": _microseconds(result.default),
        "tuned_us": _microseconds(result.best),
        "gain": round(result.gain, 3),
        "schedule": result.decisions,
    }


def _microseconds(seconds: float) -> float | None:
    return round(seconds * 1e6, 2) if seconds < float("inf") else None


class _Bar:
    """One bar: kernel, its best time so far against the default's, trials, time left."""

    def __init__(self, console: Console, quiet: bool) -> None:
        self._bar = ProgressBar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=quiet,
        )
        self._task = self._bar.add_task("tuning", total=None, left="")

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def show(self, state: Progress) -> None:
        if state.best == float("inf"):
            best = "nothing runs yet"
        else:
            best = f"best {state.best * 1e6:.1f} us, default {state.default * 1e6:.1f}"
        left = f"{int(state.seconds_left) // 60}:{int(state.seconds_left) % 60:02} left"
        self._bar.update(
            self._task,
            description=f"{state.workload}: {best}",
            completed=state.done,
            total=state.total,
            left=left,
        )
