"""The rule of tests/policy: a test starts no process and ends in moments, or is marked `slow`.

`scripts/test --fast` runs the tests without the mark. An unmarked test that breaks the rule fails,
so the fast tests stay fast, and need no mount, no server and no program.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest

MOST_WORK = 4.0
"""Processor seconds of one test with its fixtures. Today's longest takes 1.3 s; a machine may be
slower."""
MOST_WAITING = 15.0
"""Seconds for the same, without the time in which it waited for a processor. Today none waits for
more than moments; a busy disk may be slower."""
NEW_PROCESS = {"os.fork", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen"}
"""Audit events, see https://docs.python.org/3/library/audit_events.html."""
SCHEDSTAT = Path("/proc/thread-self/schedstat")

_BEGINNING = pytest.StashKey[tuple[float, float, int]]()
_processes: list[str] = []


def _note_process(event: str, args: tuple[object, ...]) -> None:
    if event in NEW_PROCESS:
        _processes.append(f"{event}{args[:2]!r}")


sys.addaudithook(_note_process)


def _clock() -> float:
    """Return seconds. The clock stands still while this thread waits for a processor, so other load
    does not count (Documentation/scheduler/sched-stats.rst: the second number, in nanoseconds)."""
    waited = int(SCHEDSTAT.read_text().split()[1]) if SCHEDSTAT.exists() else 0
    return time.monotonic() - waited / 1e9


@pytest.fixture(scope="session", autouse=True)
def _processes_of_the_session(_nothing_is_left_behind: None) -> None:
    """What ends the leftovers of an earlier run is no process of the first test."""
    _processes.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    item.stash[_BEGINNING] = _clock(), time.process_time(), len(_processes)
    yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    yield
    if item.get_closest_marker("slow"):
        return
    began, worked, before = item.stash[_BEGINNING]
    waiting, work, processes = _clock() - began, time.process_time() - worked, _processes[before:]
    if processes:
        pytest.fail(f"mark this test 'slow': it starts a process: {processes[0]}", pytrace=False)
    if work > MOST_WORK or waiting > MOST_WAITING:
        took = f"{work:.1f} s of work, {waiting:.1f} s in all"
        pytest.fail(f"mark this test 'slow': it takes {took}", pytrace=False)
