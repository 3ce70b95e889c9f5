"""`hpcfs cache warm`: walks directories through the mount, and has the daemon fetch the files.

So names are looked up as any program does, while the data goes straight into the cache: it passes
neither the kernel nor this process. Several files are fetched at once, since small ones cost a
round trip each. Failures are reported, and do not stop the rest.
"""

from __future__ import annotations

import os
import queue
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hpcfs.cli.cache_places import CacheTarget
from hpcfs.cli.output import complain
from hpcfs.cli.progress import ProgressBar
from hpcfs.control import control
from hpcfs.control.control import ControlRequest, WorkProgress
from hpcfs.model.errors import SetupError

WORKERS = 8
MAX_WAITING = 10_000
"""Files found but not yet started. The walk waits beyond that, so that memory does not grow with
the tree."""


@dataclass
class Warmed:
    """The result: files and bytes fetched, and the number of failures."""

    files: int = 0
    bytes: int = 0
    problems: int = 0


@dataclass(frozen=True, slots=True)
class _File:
    socket: Path
    mountpoint: Path
    path: str
    size: int


@dataclass
class _Work:
    """State that the walk and the workers share."""

    bar: ProgressBar
    waiting: queue.Queue[_File | None] = field(
        default_factory=lambda: queue.Queue[_File | None](MAX_WAITING)
    )
    found: Warmed = field(default_factory=Warmed)
    lock: threading.Lock = field(default_factory=threading.Lock)
    total: int = 0
    done: int = 0

    def problem(self, path: str, reason: str) -> None:
        """Count and report a failure."""
        with self.lock:
            self.found.problems += 1
            complain(f"{path}: {reason}")

    def expect(self, length: int) -> None:
        """Add a file's size to the total."""
        with self.lock:
            self.total += length
            self.bar.show(WorkProgress(self.done, self.total))

    def advance(self, length: int) -> None:
        """Add fetched bytes."""
        with self.lock:
            self.done += length
            self.bar.show(WorkProgress(self.done, self.total))


def warm(places: list[CacheTarget]) -> Warmed:
    """Fetch the files, and return when all that can be fetched is. Ctrl-C ends the process, and
    with it the requests: the daemon cancels those whose client is gone."""
    limits = {place.socket: _limit(place) for place in places}
    with ProgressBar("fetching") as bar:
        work = _Work(bar)
        workers = [threading.Thread(target=_run, args=[work], daemon=True) for _ in range(WORKERS)]
        for worker in workers:
            worker.start()
        for place in places:
            assert place.socket
            assert place.mountpoint
            root = os.path.join(place.mountpoint, os.fsdecode(place.path))
            for path, length in _walk(root, work):
                limits[place.socket] -= length
                if limits[place.socket] < 0:
                    work.problem(path, "it does not fit into the cache with the others")
                    continue
                work.expect(length)
                work.waiting.put(_File(place.socket, place.mountpoint, path, length))
        for _ in workers:
            work.waiting.put(None)
        for worker in workers:
            while worker.is_alive():
                worker.join(0.2)  # not forever: Ctrl-C must get through
    return work.found


def _limit(place: CacheTarget) -> int:
    assert place.socket
    limit = control.query_cache(place.socket).limit
    assert limit is not None
    return limit


def _walk(root: str, work: _Work) -> Iterator[tuple[str, int]]:
    """Yield the regular files at and below `root` with their sizes; symbolic links are not
    followed."""
    try:
        found = os.lstat(root)
    except OSError as error:
        work.problem(root, error.strerror or str(error))
        return
    if stat.S_ISREG(found.st_mode):
        yield root, found.st_size
    elif stat.S_ISDIR(found.st_mode):
        directories = [root]
        while directories:
            yield from _scan(directories.pop(), directories, work)


def _scan(directory: str, directories: list[str], work: _Work) -> Iterator[tuple[str, int]]:
    below = []
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    below.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    yield entry.path, entry.stat(follow_symlinks=False).st_size
    except OSError as error:
        work.problem(directory, error.strerror or str(error))
    directories += reversed(below)


def _run(work: _Work) -> None:
    """Fetch one file after the other, as a worker thread."""
    while (file := work.waiting.get()) is not None:
        _fetch(file, work)


def _fetch(file: _File, work: _Work) -> None:
    done = 0

    def show(step: WorkProgress) -> None:
        nonlocal done
        work.advance(step.done - done)
        done = step.done

    path = os.fsencode(os.path.relpath(file.path, file.mountpoint))
    try:
        outcome = control.work(file.socket, ControlRequest("warm", path), show)
    except SetupError as error:
        work.problem(file.path, str(error))
        return
    work.advance(file.size - done)
    with work.lock:
        work.found.files += 1
        work.found.bytes += outcome.bytes
