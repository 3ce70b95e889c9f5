"""What the index says of a few directories, in memory: a program that opens one file after the
other of a directory should not wait for a thread and a database each time.

The second file of a directory brings what the index has of all its files, if they are not too
many. Nothing here awaits; who changes the index says so before it does (`spoil`).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from hpcfs.cache.index import Record
from hpcfs.model import paths

MAX_DIRECTORIES = 8
MAX_FILES = 1000
"""Of one directory and all below it; up to a kilobyte each."""


@dataclass(frozen=True, slots=True)
class KnownRecords:
    """The index's answer; `record` is None where it has no such file."""

    record: Record | None


class RecordCache:
    def __init__(self) -> None:
        self._directories: OrderedDict[tuple[str, bytes], dict[bytes, Record | None] | None] = (
            OrderedDict()
        )
        """By directory: its files by key, None for one of which nothing is known any more. A
        directory without that was seen once, or has too many files."""
        self._seen: tuple[str, bytes] | None = None
        self.stamp = 0
        """Changes when the index is about to change."""

    def ask(self, origin: str, key: bytes) -> KnownRecords | None:
        """None where only the index can tell."""
        files = self._directories.get((origin, paths.parent(key)))
        if files is None:
            return None
        record = files.get(key, _ABSENT)
        if record is _ABSENT:
            return KnownRecords(None)
        return KnownRecords(record) if record is not None and record.is_complete else None

    def wants(self, origin: str, key: bytes) -> bool:
        """Whether to learn the directory of this file: it is the second one that is asked for."""
        directory = (origin, paths.parent(key))
        again = self._seen == directory and directory not in self._directories
        self._seen = directory
        return again

    def learn(self, origin: str, key: bytes, files: dict[bytes, Record] | None, stamp: int) -> None:
        """What the index answered when `stamp` was the stamp; None: too many files."""
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

    def spoil(self, origin: str, key: bytes) -> None:
        """The index is about to change for this file."""
        self.stamp += 1
        files = self._directories.get((origin, paths.parent(key)))
        if files is not None:
            files[key] = None

    def spoil_all(self) -> None:
        self.stamp += 1
        self._directories.clear()


_ABSENT = Record("", "", b"", b"", 0, 0, 0.0)
