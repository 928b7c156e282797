"""Runners that take turns, each in a process of its own, or on one thread in one.

In one process the thread pools of several runtimes spin for a while after each call and slow the next contestant
down, several times with two threads on two cores. A contestant here sleeps while another one runs. A turn is one
call that does not count and ``CALLS`` timed ones; turns alternate, so a busy moment of the machine hits all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = 5
PAUSE_SECONDS = 0.25
"""Between turns: some thread pools spin for up to 100 ms, and the next contestant would pay for it."""


def contest_parser(description: str, turns: int, output: Path) -> argparse.ArgumentParser:
    """The options of a script that runs contestants, among them those by which it starts itself as one."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--turns", type=int, default=turns)
    parser.add_argument("--output", type=Path, default=output)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--module", type=Path, help=argparse.SUPPRESS)
    return parser


class Contestant:
    """A child process: ``command`` ends in ``serve(...)``; ``threads`` cores and threads are its own."""

    def __init__(self, command: list[str], threads: int) -> None:
        variables = ("TVM_NUM_THREADS", "OMP_NUM_THREADS")
        environment = os.environ | {name: str(threads) for name in variables}
        cores = sorted(os.sched_getaffinity(0))[:threads]
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self._answer()

    def _answer(self) -> list[float]:
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"contestant ended with status {self._process.wait()}: {self._process.args}")
        return json.loads(line)

    def turn(self) -> list[float]:
        """Seconds of each timed call."""
        time.sleep(PAUSE_SECONDS)
        self._requests.write("turn\n")
        self._requests.flush()
        return self._answer()

    def close(self) -> None:
        self._requests.close()
        self._process.wait()


def serve(prepare: Callable[[], Callable[[], Any]]) -> None:
    """Answer turns of ``prepare()`` until the parent closes the pipe; what either prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run = prepare()
    for _ in range(3):
        run()
    print("[]", file=answers, flush=True)
    for _ in sys.stdin:
        run()
        seconds = []
        for _ in range(CALLS):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        print(json.dumps(seconds), file=answers, flush=True)


def contest(commands: dict[str, list[str]], threads: int, turns: int) -> dict[str, float]:
    """Median milliseconds of a call of each contestant."""
    contestants = {name: Contestant(command, threads) for name, command in commands.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(turns):
        for name, contestant in contestants.items():
            seconds[name] += contestant.turn()
    for contestant in contestants.values():
        contestant.close()
    return {name: statistics.median(values) * 1e3 for name, values in seconds.items()}


def contest_on_one_thread(
    runs: dict[str, Callable], inputs: Any, turns: int
) -> tuple[dict[str, float], dict[str, float]]:
    """(median milliseconds of a call, median of the turns' ratios to the first runner's) in this process.

    Runners that have one thread each leave none spinning. The first turn does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            taken = []
            for _ in range(1 + CALLS):
                began = time.perf_counter()
                run(inputs)
                taken.append(time.perf_counter() - began)
            if turn:
                seconds[name].append(statistics.median(taken[1:]))
    first, *others = runs
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds[first], strict=True))
        for name in others
    }
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}, ratios
