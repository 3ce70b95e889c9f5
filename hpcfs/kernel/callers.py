"""Whether the program behind a request of the kernel is waiting to end: it was sent a signal that
interrupts, and can't take it before the request is answered.

pyfuse3 does not pass the kernel's FUSE_INTERRUPT on, so /proc tells: a thread that sleeps without
being interruptible (state D) and has such a signal pending, neither blocked nor ignored, or that is
just being ended by one. See proc_pid_status(5) and proc_pid_stat(5).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP, signal.SIGKILL)
"""With which users, shells and batch systems end programs. Others (SIGCHLD, timers) would make
calls fail that on a disk are never interrupted."""
_MASK = sum(1 << (number - 1) for number in _SIGNALS)
_EXITING = 0x4  # PF_EXITING in linux/sched.h
_FLAGS, _EXIT_CODE = 6, 49
"""Fields of /proc/PID/stat, counted from the one after the name."""
_MOST_THREADS = 256
"""Looked at for one request, of its program and the programs that this one started."""


def has_signal(status: str) -> bool:
    """Return whether the thread with this /proc/PID/status sleeps without being interruptible, and
    a signal that ends programs waits for it."""
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    own, shared, blocked, ignored = (
        int(fields[name], 16) for name in ("SigPnd", "ShdPnd", "SigBlk", "SigIgn")
    )
    is_waiting = bool((own | shared) & ~blocked & ~ignored & _MASK)
    return is_waiting and fields["State"].startswith("D")


def is_killed(stat: str) -> bool:
    """Return whether the thread with this /proc/PID/stat is ending because of a signal: it closes
    its files, and has taken the signal."""
    _, _, after_name = stat.rpartition(")")
    fields = after_name.split()
    return bool(int(fields[_FLAGS]) & _EXITING and int(fields[_EXIT_CODE]) & 0x7F)


class Callers:
    """Looks at threads by their ids, in `proc`."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc

    def is_interrupted(self, thread: int) -> bool:
        """Return whether this thread waits to end. Of one that is gone, or in another namespace
        of process ids (0), nothing is known: no."""
        place = self._proc / str(thread)
        try:
            status = (place / "status").read_text(errors="replace")
            return has_signal(status) or is_killed((place / "stat").read_text(errors="replace"))
        except (OSError, LookupError, ValueError):  # it has ended, or is not to be seen
            return False

    def process_of(self, thread: int) -> int:
        """Return the process that has this thread; the thread itself where that is not known."""
        try:
            status = (self._proc / str(thread) / "status").read_text(errors="replace")
            return int(status.partition("\nTgid:")[2].partition("\n")[0])
        except (OSError, ValueError):  # it has ended, or is not to be seen
            return thread

    def users_of(self, opener: int) -> Iterator[int]:
        """Yield the threads that may use what the thread `opener` opened: itself, the others of its
        process, and those of the processes that it started; not more than a few hundred."""
        yield opener
        for thread in islice(self._relatives(opener), _MOST_THREADS):
            if thread != opener:
                yield thread

    def _relatives(self, opener: int) -> Iterator[int]:
        processes = [opener]
        seen = set[int]()
        while processes:
            process = processes.pop(0)
            if process in seen:
                continue
            seen.add(process)
            for thread in _numbers(self._proc / str(process) / "task"):
                yield thread
                try:
                    started = (self._proc / f"{process}/task/{thread}/children").read_text()
                except OSError:
                    continue
                processes += map(int, started.split())


def _numbers(directory: Path) -> list[int]:
    try:
        return [int(found.name) for found in directory.iterdir() if found.name.isdecimal()]
    except OSError:
        return []
