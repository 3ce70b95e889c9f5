"""What the machine says of the disk with the cache, and how much of it is to stay free."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class MinFree:
    """The smaller one counts where both are given."""

    size: int | None = None
    percent: float | None = None

    def of(self, total: int) -> int:
        """Bytes, for a disk of this size."""
        sizes = [] if self.size is None else [self.size]
        if self.percent is not None:
            sizes.append(int(total * self.percent / 100))
        return min(sizes, default=0)


DEFAULT_MIN_FREE = MinFree(size=5 * 1024**3, percent=5.0)


@dataclass(frozen=True, slots=True)
class Space:
    """Of a disk, in bytes; `free` is what this user may still use."""

    total: int
    free: int


def space(directory: Path) -> Space:
    """Raises OSError."""
    found = os.statvfs(directory)
    return Space(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)
