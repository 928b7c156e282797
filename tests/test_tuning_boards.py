"""Tuning over RPC, with 64-bit Arm servers under qemu as boards."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tvm_qfp8.errors import TuningError
from tvm_qfp8.targets import cpu_features, isa, parse_target
from tvm_qfp8.topi.isa import instruction_set
from tvm_qfp8.tuning.logs import LoggedSchedules, read_log
from tvm_qfp8.tuning.remote import count_boards
from tvm_qfp8.tuning.session import tune_workloads
from tvm_qfp8.tuning.workload import Workload

REPOSITORY = Path(__file__).resolve().parent.parent


def test_a_tracker_is_host_and_port():
    with pytest.raises(TuningError, match="HOST:PORT"):
        count_boards("localhost", "rpi4")


def test_no_board_is_an_error(tmp_path):
    with pytest.raises(TuningError, match="no board with key 'rpi4'"):
        tune_workloads({}, parse_target("rpi4"), tmp_path, trials=1, tracker="127.0.0.1:9", key="rpi4")


def test_another_machines_target_needs_a_tracker(tmp_path):
    with pytest.raises(TuningError, match="--tracker"):
        tune_workloads({}, parse_target("rpi4"), tmp_path, trials=1)


class Boards:
    """A tracker and emulated boards."""

    def __init__(self, python):
        from tvm.rpc.tracker import Tracker

        self.python = python
        self.tracker = Tracker("127.0.0.1", port=9390, port_end=9490)
        self.address = f"127.0.0.1:{self.tracker.port}"
        self.servers = []

    def start(self):
        command = [self.python, str(REPOSITORY / "scripts" / "board_server.py"), "--tracker", self.address]
        server = subprocess.Popen(
            [*command, "--key", "arm", "--port", str(9500 + 10 * len(self.servers))],
            env=os.environ | {"TVM_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert "serving arm on 127.0.0.1" in server.stdout.readline()
        self.servers.append(server)
        self.wait(sum(s.poll() is None for s in self.servers))
        return server

    def wait(self, boards):
        """Until the tracker has noticed."""
        for _ in range(100):
            if count_boards(self.address, "arm") == boards:
                return
            time.sleep(0.2)
        raise AssertionError(f"the tracker does not list {boards} boards")

    @staticmethod
    def stop(server):
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()

    def close(self):
        for server in self.servers:
            self.stop(server)
        self.tracker.terminate()


@pytest.fixture
def boards():
    if sys.platform != "linux":
        pytest.skip("qemu's user mode is Linux's")
    found = subprocess.run([REPOSITORY / "scripts" / "aarch64_python"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(found.stderr.strip().splitlines()[-1])
    farm = Boards(found.stdout.strip())
    yield farm
    farm.close()


@pytest.mark.aarch64
@pytest.mark.slow
def test_boards_may_vanish_and_the_run_goes_on(boards, tmp_path):
    from test_schedules import SHAPES

    target = parse_target("rpi4")
    workload = Workload(*SHAPES["some rows"], instruction_set(isa(target), cpu_features(target)), 1)
    options = dict(tracker=boards.address, key="arm", quiet=True)
    first, second = boards.start(), boards.start()

    # One of two boards goes in the middle of the run: all trials are measured all the same.
    def vanish():
        while not list(tmp_path.glob("*/database_tuning_record.json")):
            time.sleep(0.2)
        boards.stop(second)

    threading.Thread(target=vanish, daemon=True).start()
    session = tune_workloads({workload: 1}, target, tmp_path, trials=6, **options)
    (result,) = session.results
    assert session.emulated and session.folder.name.endswith("-emulated")
    assert result.trials == 6 and result.failed == 0

    # The last one goes: the run cannot go on, and says so; a new board takes over.
    boards.stop(first)
    boards.wait(0)
    with pytest.raises(TuningError, match="no board"):
        tune_workloads({workload: 1}, target, tmp_path, trials=8, **options)
    boards.start()
    (result,) = tune_workloads({workload: 1}, target, tmp_path, trials=8, **options).results
    assert result.trials == 8 and result.failed == 0
    log = read_log(session.folder)
    assert not log.problems

    # The log is applied where it is asked for, and never for a real board.
    real, emulated = LoggedSchedules(target, [tmp_path]), LoggedSchedules(target, [tmp_path], emulated=True)
    arguments = workload.schedules, workload.isa, workload.shape, 1
    assert real(*arguments) == workload.schedules.default(*arguments[1:]) and not real.used
    assert emulated(*arguments) == workload.schedules.from_decisions(result.decisions)
    assert list(emulated.used) == [workload.key]
