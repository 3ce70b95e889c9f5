"""Reads /proc/self/mountinfo (proc(5)): which filesystem is mounted where.

A read of the kernel's table never blocks, whereas stat(2) on a hung mount does. So every question
about a mount point that this table can answer is answered from it.
"""

from __future__ import annotations

import os
import re
import select
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HPCFS_TYPE = "fuse.hpcfs"


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of the table. `user_id` is the user who mounted it, for FUSE only."""

    mountpoint: Path
    kind: str
    source: str
    user_id: int | None = None


def read() -> list[MountEntry]:
    """Return the mounts of this process's namespace, in the order in which they were made."""
    return parse(Path("/proc/self/mountinfo").read_bytes())


@contextmanager
def watched() -> Iterator[Callable[[float], None]]:
    """Give a function that returns once the table has changed since its last call, or since the
    block began, or when so many seconds have passed. It blocks: call it in a thread."""
    fd = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
    try:
        table = select.poll()
        table.register(fd, select.POLLPRI)  # proc(5)

        def wait(seconds: float) -> None:
            table.poll(seconds * 1000)

        yield wait
    finally:
        os.close(fd)


def parse(table: bytes) -> list[MountEntry]:
    """Parse the content of mountinfo; malformed lines are skipped."""
    return [_parse_line(line) for line in table.splitlines() if b" - " in line]


def at(mountpoint: Path, mounts: Sequence[MountEntry]) -> MountEntry | None:
    """Return what is mounted exactly there: the last mount made, which hides those below it."""
    return next((found for found in reversed(mounts) if found.mountpoint == mountpoint), None)


def containing(path: Path, mounts: Sequence[MountEntry]) -> MountEntry | None:
    """Return the mount that holds an absolute path without symbolic links."""
    around = [path, *path.parents]
    inside = [found for found in mounts if found.mountpoint in around]
    deepest = max((len(found.mountpoint.parts) for found in inside), default=0)
    return next((m for m in reversed(inside) if len(m.mountpoint.parts) == deepest), None)


def _parse_line(line: bytes) -> MountEntry:
    left, _, right = line.partition(b" - ")
    kind, source, options = [*right.split(b" "), b"", b"", b""][:3]
    user = re.search(rb"(?:^|,)user_id=(\d+)", options)
    return MountEntry(
        mountpoint=Path(_unescape(left.split(b" ")[4])),
        kind=_unescape(kind),
        source=_unescape(source),
        user_id=int(user[1]) if user else None,
    )


def _unescape(field: bytes) -> str:
    """Decode a field: the kernel writes space, tab, newline and backslash as three octal digits."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), field))
