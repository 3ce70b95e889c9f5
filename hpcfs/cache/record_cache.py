"""Caches the index's records of a few directories in memory.

A program that opens one file after the other of a directory should not wait for a thread and a
database each time. The second file of a directory loads the records of all its files, if they are
not too many. Nothing here awaits; code that changes the index calls `invalidate` before.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from hpcfs.cache.index import Record
from hpcfs.model import paths

MAX_DIRECTORIES = 8
MAX_FILES = 1000
"""Files of one directory and all below it; up to a kilobyte each."""


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """The index's answer; `record` is None where it has no such file."""

    record: Record | None


class RecordCache:
    """The records of at most MAX_DIRECTORIES directories."""

    def __init__(self) -> None:
        self._directories: OrderedDict[tuple[str, bytes], dict[bytes, Record | None] | None] = (
            OrderedDict()
        )
        """By directory: its files by key, None for a file whose record was invalidated. A directory
        whose value is None was looked up once, or has too many files."""
        self._seen: tuple[str, bytes] | None = None
        self.stamp = 0
        """A counter that changes when the index is about to change."""

    def find(self, origin: str, key: bytes) -> CachedAnswer | None:
        """Return the index's answer; None where only the index can tell."""
        files = self._directories.get((origin, paths.parent(key)))
        if files is None:
            return None
        record = files.get(key, _ABSENT)
        if record is _ABSENT:
            return CachedAnswer(None)
        return CachedAnswer(record) if record is not None and record.is_complete else None

    def wants(self, origin: str, key: bytes) -> bool:
        """Return whether to load the directory of this file, because it is the second file that is
        looked up."""
        directory = (origin, paths.parent(key))
        again = self._seen == directory and directory not in self._directories
        self._seen = directory
        return again

    def learn(self, origin: str, key: bytes, files: dict[bytes, Record] | None, stamp: int) -> None:
        """Store the index's answer for a directory, read at `stamp`. `files` is None where there
        are too many."""
        if stamp != self.stamp:
            return
        parent = paths.parent(key)
        self._directories[origin, parent] = (
            None
            if files is None
            else {at: record for at, record in files.items() if paths.parent(at) == parent}
        )
        if len(self._directories) > MAX_DIRECTORIES:
            self._directories.popitem(last=False)

    def invalidate(self, origin: str, key: bytes) -> None:
        """Forget the file's record, which is about to change in the index."""
        self.stamp += 1
        files = self._directories.get((origin, paths.parent(key)))
        if files is not None:
            files[key] = None

    def invalidate_all(self) -> None:
        """Forget all records, before a change of many."""
        self.stamp += 1
        self._directories.clear()


_ABSENT = Record("", "", b"", b"", 0, 0, 0.0)
