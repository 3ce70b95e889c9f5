"""The size and the free space of the disk with the cache, and how much must stay free."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class MinFree:
    """The room that must stay free, in bytes or percent; where both are given the smaller one
    counts."""

    size: int | None = None
    percent: float | None = None

    def of(self, total: int) -> int:
        """Return the bytes that must stay free on a disk of `total` bytes."""
        sizes = [] if self.size is None else [self.size]
        if self.percent is not None:
            sizes.append(int(total * self.percent / 100))
        return min(sizes, default=0)


DEFAULT_MIN_FREE = MinFree(size=5 * 1024**3, percent=5.0)


@dataclass(frozen=True, slots=True)
class Space:
    """The size of a disk in bytes; `free` is the part that this user may still use."""

    total: int
    free: int


def space(directory: Path) -> Space:
    """Return the space of the disk that holds the directory. Raises OSError."""
    found = os.statvfs(directory)
    return Space(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)
