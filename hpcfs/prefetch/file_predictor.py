"""Which files of a directory a program will read next: pure policy, no I/O, never awaits.

Programs that read a directory's files one after another (cp -r, grep -r, tar, rsync) go by one of
three orders: as the directory was listed, by name, or by inode number, which coreutils sort by.
After a few files the policy knows which one, and names those that come next: more with every file
that was foreseen, as many as the program reads in the time for which they stay good, and none once
it reads something else.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Generic, Protocol, TypeVar

FIRST_AHEAD = 4
GOING_ON_AHEAD = 32
"""In the next directory of a tree that is read."""
MOST_AHEAD = 64
GOOD_SECONDS = 0.6
"""Files are foreseen so far ahead that they are read before their version must be asked again
(tree.ATTRIBUTE_SECONDS)."""
PAUSE_SECONDS = 1.0
"""So long a program may do something else between two files."""
_FILES_TO_TRUST = 3
_WIDEST_STEP = 4
"""Positions between two files read one after another: some are skipped (links, what exists
already)."""
_RECENT = 8


class File(Protocol):
    """A file of the directory, by its inode number and name."""

    @property
    def ino(self) -> int:
        """Its inode number."""
        ...

    @property
    def name(self) -> bytes:
        """Its name, in bytes."""
        ...


F = TypeVar("F", bound=File)


class SortedFiles(Generic[F]):
    """A directory's files in one order; `positions` are by inode number."""

    def __init__(self, files: Sequence[F]) -> None:
        self.files = files
        self.positions = {file.ino: at for at, file in enumerate(files)}


def orders_of(files: Sequence[F]) -> list[SortedFiles[F]]:
    """Return the orders that programs go by; `files` are as they were listed."""
    return [
        SortedFiles(files),
        SortedFiles(sorted(files, key=lambda file: file.name)),
        SortedFiles(sorted(files, key=lambda file: file.ino)),
    ]


class FilePredictor(Generic[F]):
    """Predicts which files of one directory a program reads next.

    `list_files` returns its files, and is not called before there may be a pattern: most are opened
    without one. `trusted` is the number of the order by which the program read another directory
    just before: then nothing needs to be learned.
    """

    def __init__(
        self,
        list_files: Callable[[], Sequence[F]],
        trusted: int | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._list_files = list_files
        self._sorted: list[SortedFiles[F]] | None = None
        self._trusted = trusted
        self._now = now
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RECENT)
        self._ahead = FIRST_AHEAD if trusted is None else GOING_ON_AHEAD
        self._foreseen: set[int] = set()

    @property
    def _orders(self) -> list[SortedFiles[F]]:
        if self._sorted is None:
            self._sorted = orders_of(self._list_files())
        return self._sorted

    @property
    def order(self) -> int | None:
        """The number of the order that the program goes by, if that is clear."""
        return self._trusted

    def opened(self, ino: int) -> list[F]:
        """Note that the program opened this file to read it; return what to fetch ahead now."""
        now = self._now()
        if self._recent and now - self._recent[-1][0] > PAUSE_SECONDS:
            self._recent.clear()
            self._foreseen.clear()
            self._ahead = FIRST_AHEAD
        if self._recent and self._recent[-1][1] == ino:
            return []
        self._recent.append((now, ino))
        if len(self._recent) >= _FILES_TO_TRUST:
            self._trusted = self._followed()
        if self._trusted is None:
            self._ahead = FIRST_AHEAD
            return []
        if ino in self._foreseen:
            self._ahead = min(MOST_AHEAD, 2 * self._ahead)
        return self._following(ino, self._limit(now))

    def knows(self, ino: int) -> bool:
        """Whether the file was in the directory when its files were listed, if they were."""
        return self._sorted is None or ino in self._sorted[0].positions

    def first(self, count: int = GOING_ON_AHEAD) -> list[F]:
        """Return what to fetch before the first file of the directory is read."""
        if self._trusted is None:
            return []
        return self._take(self._orders[self._trusted].files[:count])

    def _followed(self) -> int | None:
        """Return the order in which the last files follow each other most closely, if one does."""
        numbers = [ino for _, ino in self._recent][-_FILES_TO_TRUST:]
        best: tuple[int, int] | None = None
        for which, order in enumerate(self._orders):
            places = [order.positions.get(ino, -1) for ino in numbers]
            steps = [later - sooner for sooner, later in pairwise(places)]
            if -1 in places or not all(1 <= step <= _WIDEST_STEP for step in steps):
                continue
            if best is None or sum(steps) < best[0]:
                best = sum(steps), which
        return None if best is None else best[1]

    def _limit(self, now: float) -> int:
        """Return how many files the program reads in GOOD_SECONDS, at its present rate."""
        began, count = self._recent[0][0], len(self._recent) - 1
        if not count or now <= began:
            return self._ahead
        return max(FIRST_AHEAD, min(self._ahead, int(GOOD_SECONDS * count / (now - began))))

    def _following(self, ino: int, count: int) -> list[F]:
        assert self._trusted is not None
        order = self._orders[self._trusted]
        position = order.positions.get(ino)
        if position is None:
            return []
        return self._take(order.files[position + 1 : position + 1 + count])

    def _take(self, files: Sequence[F]) -> list[F]:
        """Return those that were not named before."""
        new = [file for file in files if file.ino not in self._foreseen]
        self._foreseen.update(file.ino for file in new)
        return new
