"""Kills a daemon, or its transfer process, right before a chosen one of its steps.

A step is a call of the process that changes something outside of it: the cache, the journal, what
is synced, names in the cache, what its other half, the network or the kernel is told. A preloaded
library (steps.c) counts them by kind, over all threads, so that the n-th of a kind is about the
same in every run of a story; killing before each of them leaves no state between two steps untried.
Unlike a tracer it needs no privileges and costs nothing while nobody is watched.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
from collections.abc import Iterator
from pathlib import Path

KINDS = ("cache", "journal", "sync", "names", "tell", "net", "answer")
"""In the order of steps.c. tell: the other process, over their socket; answer: the kernel."""
DAEMON = -1
"""A victim: the daemon that is about to be started, whichever its number."""


def spread(counts: dict[str, int], most: int) -> Iterator[tuple[str, int]]:
    """Of each kind of steps so many at most, evenly over all: (kind, its number from 1)."""
    for kind, count in counts.items():
        chosen = min(most, count)
        for number in range(chosen):
            yield kind, 1 + (count - 1) * number // (chosen - 1) if chosen > 1 else (count + 1) // 2


def is_gone(pid: int) -> bool:
    """Or a zombie."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


class _Page(ctypes.Structure):
    _fields_ = (
        ("victim", ctypes.c_int),
        ("also", ctypes.c_int),
        ("kind", ctypes.c_int),
        ("left", ctypes.c_int),
        ("killed", ctypes.c_int),
        ("counts", ctypes.c_int * len(KINDS)),
    )


class Steps:
    """`environ` is for what starts the daemon."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        library, page = directory / "steps.so", directory / "page"
        source = Path(__file__).with_suffix(".c")
        command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, source]
        subprocess.run([*command, "-ldl"], check=True)
        page.write_bytes(bytes(mmap.PAGESIZE))
        with page.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        self._page = _Page.from_buffer(self._map)
        self.environ = {"LD_PRELOAD": str(library), "HPCFS_STEPS": str(page)}

    def watch(self, pid: int, kind: str | None = None, nth: int = 0, also: int = 0) -> None:
        """Count this process's steps from now on; kill it before the `nth` (from 1) of a kind."""
        self._page.victim = 0
        self._page.counts = (ctypes.c_int * len(KINDS))()
        self._page.killed = 0
        self._page.also = also
        self._page.left = nth
        self._page.kind = -1 if kind is None else KINDS.index(kind)
        self._page.victim = pid

    def stop(self) -> dict[str, int]:
        """How many steps of each kind there were."""
        self._page.victim = 0
        return dict(zip(KINDS, self._page.counts, strict=True))

    @property
    def killed(self) -> int:
        """The process that was killed, 0 if none was."""
        return self._page.killed

    @property
    def has_killed(self) -> bool:
        return bool(self.killed)
