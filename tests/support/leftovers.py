"""What tests leave behind: mounts, daemons and servers of a run that was killed, or of a bad test.

A run holds a lock in its temporary directory for as long as it lives; where nobody holds the lock
any more, its mounts are stale. Runs that go on at the same time, and mounts elsewhere, are never
touched. `python -m tests.support.leftovers` sweeps up after runs that have ended.
"""

from __future__ import annotations

import fcntl
import getpass
import os
import re
import select
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hpcfs.control import mountpoint

LOCK_NAME = "hpcfs-test-run.lock"
MARK = "HPCFS_TEST_RUN"
"""In the environment of what a run starts: servers need not have a file open in its directory."""
GRACE_SECONDS = float(os.environ.get("HPCFS_GRACE", "10"))
"""For processes that are ending when the last test is over."""
OUR_PROGRAMS = re.compile(rb"hpcfs|tests\.support|sshd|sftp-server|rclone|moto")
"""Not a shell or an editor that looks at a test's files."""


@dataclass(frozen=True)
class Leftovers:
    mounts: list[Path]
    processes: dict[int, str]

    def __bool__(self) -> bool:
        return bool(self.mounts or self.processes)

    def __str__(self) -> str:
        mounts = [f"mount {place}" for place in self.mounts]
        return "; ".join([*mounts, *(f"pid {pid}: {cmd}" for pid, cmd in self.processes.items())])


def hold(base: Path) -> int:
    """Mark the run that uses `base` as alive, until the returned descriptor is closed."""
    os.environ[MARK] = str(base.resolve())
    lock = os.open(base / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def of_run(base: Path) -> Leftovers:
    """What is there now below this directory."""
    return Leftovers(_mounts_below(base), dict(_processes_below(base)))


def of_finished_run(base: Path) -> Leftovers:
    """What is still there once everything that is ending has ended."""
    found = of_run(base)
    deadline = time.monotonic() + GRACE_SECONDS
    for pid in found.processes:
        _wait(pid, deadline)
    return of_run(base) if found else found


def end(found: Leftovers) -> None:
    for place in reversed(found.mounts):
        mountpoint.unmount(place, lazy=True)
    for pid in found.processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in found.processes:
        _wait(pid, time.monotonic() + GRACE_SECONDS)


def sweep() -> list[Leftovers]:
    """End what runs that are over have left behind; returns what it was."""
    swept = []
    for base in _run_directories():
        found = of_run(base)
        if not is_over(base):
            dead = [place for place in found.mounts if mountpoint.is_dead(place)]
            found = Leftovers(dead if not (base / LOCK_NAME).exists() else [], {})
        if found:
            end(found)
            swept.append(found)
    return swept


def _run_directories() -> list[Path]:
    """pytest's: the last few runs' are kept."""
    root = Path(os.environ.get("PYTEST_DEBUG_TEMPROOT") or tempfile.gettempdir()).resolve()
    return sorted((root / f"pytest-of-{getpass.getuser()}").glob("pytest-[0-9]*"))


def is_over(base: Path) -> bool:
    try:
        lock = os.open(base / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False  # nobody knows
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def _mounts_below(base: Path) -> list[Path]:
    return [
        found.mountpoint
        for found in mountpoint.mounts()
        if found.mountpoint.is_relative_to(base.resolve())
    ]


def _processes_below(base: Path) -> Iterator[tuple[int, str]]:
    """Our programs that a run started, that work in its directory, or have files open there."""
    inside = f"{base.resolve()}/"
    for process in Path("/proc").glob("[0-9]*"):
        pid = int(process.name)
        with suppress(OSError):  # it ended, or is another user's
            command = (process / "cmdline").read_bytes()
            if pid != os.getpid() and OUR_PROGRAMS.search(command) and _uses(process, inside):
                yield pid, command.replace(b"\0", b" ").decode(errors="replace")[:200]


def _uses(process: Path, inside: str) -> bool:
    marks = f"{MARK}={inside.rstrip('/')}".encode()
    if marks in (process / "environ").read_bytes().split(b"\0"):
        return True
    for link in (process / "cwd", *(process / "fd").iterdir()):
        with suppress(OSError):
            if f"{os.readlink(link)}/".startswith(inside):
                return True
    return False


def _wait(pid: int, deadline: float) -> None:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    select.select([process], [], [], max(0.0, deadline - time.monotonic()))
    os.close(process)


if __name__ == "__main__":
    for found in sweep():
        print(f"swept up after a test run that was killed: {found}", file=sys.stderr)
