"""Tuning logs: one folder for each kind of machine, with MetaSchedule's database and a manifest.

::

    tuning_logs/x86_64-znver3-1f0c2a9b/
        manifest.json                 target features, TVM version, machine, whether emulated, gains
        database_workload.json        MetaSchedule's JSONDatabase
        database_tuning_record.json

A folder is used for a target with the same architecture, CPU, features and TVM version, and for no other. Whatever is
missing or damaged costs a warning, and the default schedule is taken.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms
from tvm.target import Target, codegen

from tvm_qfp8.targets import cpu_features
from tvm_qfp8.topi.gemm import GemmShape
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.schedules import REGISTER_DECODE_ROWS, RETIRED, SHARING, Decisions, GemmSchedule
from tvm_qfp8.tuning.search import read_decisions
from tvm_qfp8.tuning.workload import ATTRIBUTE, Workload, template

WORKLOADS, RECORDS, MANIFEST = "database_workload.json", "database_tuning_record.json", "manifest.json"
FAILED_SECONDS = 1e9
"""MetaSchedule notes a candidate that failed with 1e10 seconds."""


MIN_GAIN = 1.01
"""A schedule replaces the default if it is faster by this factor."""


def machine_key(target: Target) -> dict[str, Any]:
    """What must be equal for a record to be used: architecture, CPU, features, TVM version."""
    triple = str(target.attrs.get("mtriple", codegen.llvm_get_system_triple()))
    return {
        "architecture": triple.partition("-")[0],
        "cpu": str(target.attrs.get("mcpu", "")),
        "features": sorted(cpu_features(target)),
        "tvm": importlib.metadata.version("apache-tvm"),
    }


def log_folder(root: str | os.PathLike, target: Target, emulated: bool = False) -> Path:
    """The target's folder below ``root``; emulated machines have folders of their own."""
    key = machine_key(target)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    parts = [key["architecture"], key["cpu"], digest, "emulated" if emulated else ""]
    return Path(root) / "-".join(part for part in parts if part)


def default_roots() -> list[Path]:
    """Where ``compile`` looks: the logs of this package, then those that ``tvm-qfp8 tune`` made on this machine."""
    import tvm_qfp8.tuning_logs

    return [Path(next(iter(tvm_qfp8.tuning_logs.__path__))), user_root()]


def user_root() -> Path:
    """Where ``tvm-qfp8 tune`` writes unless told otherwise."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "tvm_qfp8" / "tuning_logs"


@dataclass
class LogFile:
    """The readable part of one folder."""

    folder: Path
    workloads: list[ms.database.Workload | None] = field(default_factory=list)
    """One for each line; None where it is damaged."""
    records: list[tuple[str, ms.database.TuningRecord]] = field(default_factory=list)
    """(workload's key, record)."""
    problems: list[str] = field(default_factory=list)


def read_log(folder: Path) -> LogFile:
    """Everything that can be read; damaged lines are named in ``problems``."""
    log = LogFile(folder)
    for where, text in _lines(folder / WORKLOADS, log.problems):
        try:
            log.workloads.append(ms.database.Workload.from_json(json.loads(text)))
        except Exception as error:  # noqa: BLE001 - whatever a damaged line makes TVM raise
            log.workloads.append(None)
            log.problems.append(f"{where}: {_first_line(error)}")
    keys = [str(w.mod["main"].attrs[ATTRIBUTE]) if w is not None else "" for w in log.workloads]
    for where, text in _lines(folder / RECORDS, log.problems):
        try:
            index, entry = json.loads(text)
            workload = log.workloads[index] if index >= 0 else None
            if workload is None:
                raise ValueError("its workload is damaged")
            log.records.append((keys[index], ms.database.TuningRecord.from_json(entry, workload)))
        except Exception as error:  # noqa: BLE001
            log.problems.append(f"{where}: {_first_line(error)}")
    return log


@functools.lru_cache(maxsize=4)
def _read_log_of(folder: Path, _changed: tuple[int, ...]) -> LogFile:
    """``read_log``, once for each state of the files: a process may compile many models."""
    return read_log(folder)


def _lines(path: Path, problems: list[str]) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_bytes().decode(errors="replace")
    except OSError as error:
        problems.append(f"{path}: {error.strerror}")
        return
    for number, line in enumerate(text.splitlines(), 1):
        yield f"{path}:{number}", line


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def mean_seconds(record: ms.database.TuningRecord) -> float:
    """Mean of a record's times; infinite where the candidate failed."""
    times = [float(s) for s in record.run_secs or []]
    mean = sum(times) / len(times) if times else float("inf")
    return mean if mean < FAILED_SECONDS else float("inf")


def record_decisions(record: ms.database.TuningRecord) -> Decisions:
    """The decisions of a record's trace."""
    schedule = Schedule(record.workload.mod)
    record.trace.apply_to_schedule(schedule, remove_postproc=True)
    return {name: value for name, value in read_decisions(schedule).items() if name not in RETIRED}


def best_schedule(times: Mapping[tuple, float], default: tuple) -> tuple:
    """The decisions with the least seconds; the default unless another is faster by more than noise."""
    best = min(times, key=lambda decisions: times[decisions])
    return best if times[best] * MIN_GAIN < times.get(default, float("inf")) else default


class LoggedSchedules:
    """A ``ScheduleChooser``: the best logged schedule of a workload, else the default.

    Where the log has none for a number of threads, they take the schedule of one thread; for a number of rows of a
    dense layer, that of the nearest number, so that a module for several lengths packs weights once.

    Parameters
    ----------
    target : tvm.target.Target
        A CPU.
    roots : list of path
        Folders of logs. Of several records of one schedule the last counts.
    emulated : bool
        Read the logs of emulated machines instead; they say nothing about real ones.
    """

    def __init__(self, target: Target, roots: list[Path], emulated: bool = False) -> None:
        self.used: dict[str, Decisions] = {}
        """Workloads whose schedule came from a log."""
        self.asked: set[str] = set()
        """All workloads that were asked for."""
        self._records: dict[str, list[ms.database.TuningRecord]] = {}
        self._chosen: dict[str, Any] = {}
        for root in roots:
            if not root.is_dir() and root not in default_roots():
                _warn(f"folder {root} does not exist")
            folder = log_folder(root, target, emulated)
            if folder.is_dir() and self._belongs(folder, target, emulated):
                self._read(folder)

    def _belongs(self, folder: Path, target: Target, emulated: bool) -> bool:
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            fits = manifest["key"] == machine_key(target) and manifest["emulated"] == emulated
        except (OSError, ValueError, KeyError, TypeError) as error:
            _warn(f"{folder / MANIFEST} cannot be read ({_first_line(error)})")
            return False
        if not fits:
            _warn(f"{folder} was made for another machine than its name says")
        return fits

    def _read(self, folder: Path) -> None:
        files = (folder / WORKLOADS, folder / RECORDS)
        log = _read_log_of(folder, tuple(path.stat().st_mtime_ns for path in files if path.exists()))
        if log.problems:
            more = f" and {len(log.problems) - 1} more" if len(log.problems) > 1 else ""
            _warn(f"damaged: {log.problems[0]}{more}")
        for key, record in log.records:
            self._records.setdefault(key, []).append(record)

    def __call__(self, schedules: Any, isa: InstructionSet, shape: Any, threads: int) -> Any:
        workload = Workload.of(schedules, isa, shape, threads)
        self.asked.add(workload.key)
        if workload.key not in self._chosen:
            self._chosen[workload.key] = self._choose(workload)
        return self._chosen[workload.key]

    def _choose(self, workload: Workload) -> Any:
        default = workload.default()
        decisions = self._best(workload)
        if decisions is None:
            # Tiles that are best for one thread are good for several, those of some rows good for more; how threads
            # share the work depends on both.
            near = self._best_of_other_rows(workload)
            if near is None and workload.threads > 1:
                alone = replace(workload, threads=1)
                near = self._best(alone) or self._best_of_other_rows(alone)
            decisions = near and near | {name: default[name] for name in SHARING if name in default}
        if decisions is None or not workload.allows(decisions):
            return workload.schedules.from_decisions(default)
        self.used[workload.key] = decisions
        return workload.schedules.from_decisions(decisions)

    def _best_of_other_rows(self, workload: Workload) -> Decisions | None:
        """What suits a dense layer that differs in the number of rows only; None without any."""
        if not isinstance(workload.shape, GemmShape):
            return None
        rows, row_group = workload.shape.rows, workload.isa.row_group
        few = rows <= REGISTER_DECODE_ROWS  # another kernel, which decodes weights in registers
        alike = [logged for logged in self._logged_rows if rows and (logged <= REGISTER_DECODE_ROWS) == few]
        for logged in sorted(alike, key=lambda other: abs(math.log(other / rows))):
            best = self._best(replace(workload, shape=replace(workload.shape, rows=logged)))
            if best is not None:
                return GemmSchedule.from_decisions(best).for_rows(rows, row_group).decisions()
        return None

    @functools.cached_property
    def _logged_rows(self) -> set[int]:
        """All numbers of rows of dense layers in the log."""
        shapes = [json.loads(key) for key in self._records]
        return {shape["shape"]["rows"] for shape in shapes if shape["family"] == "gemm"}

    def _best(self, workload: Workload) -> Decisions | None:
        """The best decisions in the log, None without any."""
        times: dict[tuple, float] = {}
        damaged = 0
        for record in self._records.get(workload.key, []):
            try:
                decisions = record_decisions(record)
            except Exception:  # noqa: BLE001 - a trace that TVM cannot replay
                damaged += 1
                continue
            if workload.allows(decisions):
                times[tuple(decisions.items())] = mean_seconds(record)
            else:
                damaged += 1
        if damaged:
            _warn(f"holds {damaged} records of {workload} that are no schedules of this version")
        return dict(best_schedule(times, tuple(workload.default().items()))) if times else None


def _warn(problem: str) -> None:
    warnings.warn(
        f"tuning log {problem}; where a record is missing the default schedule is taken", stacklevel=2
    )


class LogWriter:
    """The database that a tuning run reads, and appends to as it goes on."""

    def __init__(self, root: str | os.PathLike, target: Target, emulated: bool = False) -> None:
        self.target, self.emulated = target, emulated
        self.folder = log_folder(root, target, emulated)
        self.folder.mkdir(parents=True, exist_ok=True)
        log = read_log(self.folder) if (self.folder / WORKLOADS).exists() else LogFile(self.folder)
        self.problems = log.problems
        if log.problems:
            self._set_aside()
        self.database = ms.database.JSONDatabase(
            str(self.folder / WORKLOADS), str(self.folder / RECORDS), module_equality="structural"
        )
        if log.problems:
            for _, old in log.records:
                workload = self.database.commit_workload(old.workload.mod)
                self.database.commit_tuning_record(
                    ms.database.TuningRecord(old.trace, workload, old.run_secs, old.target, old.args_info)
                )
        self._measured: dict[str, dict[tuple, float]] = {}
        for key, record in log.records:
            decisions = record_decisions(record)
            self._measured.setdefault(key, {})[tuple(decisions.items())] = mean_seconds(record)

    def _set_aside(self) -> None:
        """Keep damaged files under other names; what could be read is written anew."""
        for name in (WORKLOADS, RECORDS):
            path = self.folder / name
            if path.exists():
                os.replace(path, path.with_name(name + ".damaged"))

    def measured(self, workload: Workload) -> dict[tuple, float]:
        """Decisions (as items) -> mean seconds, infinite for a failure, of all that the log holds."""
        return self._measured.setdefault(workload.key, {})

    def commit(self, workload: Workload, candidate: ms.MeasureCandidate, seconds: list[float] | None) -> None:
        """Append one measurement; None for a candidate that failed."""
        record = ms.database.TuningRecord(
            candidate.sch.trace.simplified(remove_postproc=True),
            self.database.commit_workload(template(workload)),
            seconds or [1e10],
            self.target,
            [],
        )
        self.database.commit_tuning_record(record)
        decisions = read_decisions(candidate.sch)
        self.measured(workload)[tuple(decisions.items())] = mean_seconds(record)

    def write_manifest(self, machine: dict[str, Any], results: list[dict[str, Any]]) -> None:
        """Describe the log, keeping earlier results of other workloads."""
        path = self.folder / MANIFEST
        try:
            earlier = json.loads(path.read_text())["workloads"]
        except (OSError, ValueError, KeyError, TypeError):
            earlier = []
        names = {entry["workload"] for entry in results}
        manifest = {
            "key": machine_key(self.target),
            "emulated": self.emulated,
            "machine": machine,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "workloads": [entry for entry in earlier if entry["workload"] not in names] + results,
        }
        part = path.with_suffix(".part")
        part.write_text(json.dumps(manifest, indent=1) + "\n")
        os.replace(part, path)
