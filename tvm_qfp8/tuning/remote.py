"""Building here and timing on boards, through TVM's RPC tracker.

Every board that the tracker lists under the key takes candidates; each is timed by a worker process here that asks the
tracker for a free board. A board that vanishes costs only what it was timing: the worker is stopped after a time
limit, and the candidate is tried once more, on whatever board is free. A failure counts against the candidate only
while boards are there.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tvm
from tvm import rpc
from tvm.s_tir import meta_schedule as ms
from tvm.support.popen_pool import PopenWorker
from tvm.target import Target

from tvm_qfp8 import tvm_fixes
from tvm_qfp8.errors import TuningError
from tvm_qfp8.host_cpu import usable_cores
from tvm_qfp8.tuning.logs import machine_key
from tvm_qfp8.tuning.measure import LOST, build_all, fastest, make_builder, remove_artifact

SESSION_SECONDS = 60
"""A board is given so long for one candidate, waiting for the board not included."""

WAIT_SECONDS = 60
"""So long a worker waits for a free board."""

EVALUATOR = ms.runner.EvaluatorConfig(number=1, repeat=6, min_repeat_ms=20, enable_cpu_cache_flush=False)


def connect(tracker: str, key: str) -> rpc.RPCSession:
    """A session on a free board."""
    return rpc.connect_tracker(*_address(tracker)).request(key, session_timeout=SESSION_SECONDS)


def _address(tracker: str) -> tuple[str, int]:
    host, colon, port = tracker.rpartition(":")
    if not colon or not port.isdigit():
        raise TuningError(f"--tracker is HOST:PORT, as in 127.0.0.1:9190, not {tracker!r}")
    return host, int(port)


def count_boards(tracker: str, key: str) -> int:
    """Boards that the tracker lists under the key; 0 where no tracker answers.

    Raises
    ------
    TuningError
        ``tracker`` is not ``HOST:PORT``.
    """
    host, port = _address(tracker)
    try:
        # TVM's client would go on trying for a minute.
        socket.create_connection((host, port), timeout=5).close()
        listed = rpc.connect_tracker(host, port).summary()["server_info"]
    except (RuntimeError, OSError, ValueError, tvm.error.RPCError):
        return 0
    return sum(str(board["key"]) == f"server:{key}" for board in listed)


def time_on_board(tracker: str, key: str, library: str, arguments: tuple, evaluator: Any) -> list[float]:
    """Upload a kernel and time it; what a worker runs."""
    from tvm.s_tir.meta_schedule.runner.utils import alloc_argument_common, run_evaluator_common

    session = connect(tracker, key)
    name = f"{Path(library).parent.name}.so"
    try:
        session.upload(library, name)
        module = session.load_module(name)
        device = session.cpu(0)
        fill = session.get_function("tvm.contrib.random.random_fill_for_measure")
        tensors = alloc_argument_common(fill, device, arguments, 1)
        return run_evaluator_common(module, device, evaluator, tensors)
    finally:
        session.remove(name)


def board_is_emulated(tracker: str, key: str, architecture: str) -> bool:
    """Whether the board's kernel is another architecture's than its programs: an emulator such as qemu-user."""
    session = connect(tracker, key)
    try:
        kernel = bytes(session.download("/proc/sys/kernel/arch")).decode().strip()
    except (RuntimeError, tvm.error.RPCError):
        # Linux before 6.1 has no such file; x86's cpuinfo speaks of vendors.
        session = connect(tracker, key)
        x86 = b"vendor_id" in bytes(session.download("/proc/cpuinfo"))
        return x86 != (architecture == "x86_64")
    return not kernel.startswith(architecture[:3])


class RemoteMeasurer:
    """Times kernels on all boards of a tracker that share a key.

    Parameters
    ----------
    target : tvm.target.Target
        What the boards are.
    tracker : str
        ``HOST:PORT``.
    key : str
        The boards' key.

    Raises
    ------
    TuningError
        No board answers, or ``tracker`` is not ``HOST:PORT``.
    """

    def __init__(self, target: Target, tracker: str, key: str) -> None:
        self.target, self.tracker, self.key = target, tracker, key
        boards = self._boards()
        self.batch = max(16, 4 * boards)
        self._builder = make_builder(target, usable_cores())
        self._workers = [PopenWorker(initializer=tvm_fixes.apply) for _ in range(boards)]
        architecture = machine_key(target)["architecture"]
        self.emulated: bool = self._call(
            self._workers[0], functools.partial(board_is_emulated, tracker, key, architecture)
        )

    def _boards(self) -> int:
        boards = count_boards(self.tracker, self.key)
        if not boards:
            raise TuningError(
                f"no board with key {self.key!r} at tracker {self.tracker}; docs/tuning.md says how to start one, "
                f"`python -m tvm.exec.query_rpc_tracker` lists them"
            )
        return boards

    def _call(self, worker: PopenWorker, task: Any) -> Any:
        """``task()`` in a worker, which is stopped where it takes too long."""
        worker.send(task, timeout=SESSION_SECONDS + WAIT_SECONDS)
        return worker.recv()

    def measure(self, kernels: Sequence[tvm.IRModule], rounds: int = 1) -> list[list[float] | None]:
        self._boards()
        built = build_all(self._builder, self.target, kernels)
        times: list[list[float]] = [[] for _ in built]
        try:
            for _ in range(rounds):
                self._round(built, times)
            boards_are_there = count_boards(self.tracker, self.key) > 0
            return [
                fastest(found) if found or boards_are_there or built[i] is None else LOST
                for i, found in enumerate(times)
            ]
        finally:
            for kernel in built:
                remove_artifact(kernel)

    def _round(self, built: Sequence[Any], times: list[list[float]]) -> None:
        """Time every kernel once; what failed is tried once more, since its board may have vanished."""
        waiting = [i for i, kernel in enumerate(built) if kernel is not None]
        for _ in range(2):
            found = self._share(waiting, built)
            for i, seconds in found:
                times[i].extend(seconds)
            waiting = [i for i, seconds in found if not seconds]
            if not count_boards(self.tracker, self.key):
                return

    def _share(self, indices: list[int], built: Sequence[Any]) -> list[tuple[int, list[float]]]:
        """Time kernels on all boards at once."""
        if not indices:
            return []
        free = list(self._workers)

        def one(index: int) -> tuple[int, list[float]]:
            worker = free.pop()
            try:
                return index, self._time(worker, built[index])
            finally:
                free.append(worker)

        with ThreadPoolExecutor(len(self._workers)) as pool:
            try:
                return list(pool.map(one, indices))
            except BaseException:
                for worker in self._workers:
                    worker.kill()
                raise

    def _time(self, worker: PopenWorker, built: ms.runner.RunnerInput) -> list[float]:
        arguments = tuple(info.as_json() for info in built.args_info)
        task = functools.partial(
            time_on_board, self.tracker, self.key, str(built.artifact_path), arguments, EVALUATOR
        )
        try:
            return self._call(worker, task)
        except Exception:  # noqa: BLE001 - whatever crossed the wire; a failure is an answer here
            return []
