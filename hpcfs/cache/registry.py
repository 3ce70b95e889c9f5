"""A cache directory as all parts of the cache share it: its index, and the files that are open.

A file that is open here is known in memory, and what the index has of it is behind; one that is
not is *idle*, and only the index knows of it. Files change sides under `lookup`, so that what one
task is about to open is not what another evicts.

`indexed_bytes` and `rows` are of the same moment whenever a task looks: the total comes back with
what changed it (`change`), and who changed the index changes `rows` before its next await. A sum
taken in between would be too small, and eviction would believe it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import trio

from hpcfs.cache.file import CacheFile
from hpcfs.cache.index import Index, Record
from hpcfs.cache.record_cache import RecordCache
from hpcfs.cache.verified_blocks import VerifiedBlocks

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """What the index says of an open file, to tell whether it must be told anew."""

    key: bytes
    version: bytes
    size: int
    cached_bytes: int
    last_used: float
    pinned: bool

    @classmethod
    def of(cls, file: CacheFile | Record) -> Row:
        return cls(
            file.key, file.version, file.size, file.cached_bytes, file.last_used, file.pinned
        )


class Registry:
    def __init__(self, directory: Path, index: Index) -> None:
        self.directory = directory
        self.index = index
        self.files: dict[str, CacheFile] = {}
        """All that are open, by name."""
        self.rows: dict[str, Row] = {}
        """What the index has of them."""
        self.indexed_bytes = index.total_bytes()
        """As the index had it last, open files included."""
        self.spooled_bytes = 0
        """Of long listings, in temporary files beside the cache's."""
        self.lookup = trio.Lock()
        self.record_cache = RecordCache()
        self.verified_blocks = VerifiedBlocks()
        self.is_saving = False
        """While the index is told of open files: none may be closed meanwhile."""
        self.deleting: set[str] = set()
        """Closed for good, and perhaps still in the index: not to be opened again."""
        self._data = str(directory / "data")
        self._limiter = trio.CapacityLimiter(1)

    async def in_thread(self, work: Callable[..., T], *args: object) -> T:
        """Disk work, one piece at a time: the index serves one caller."""
        return await trio.to_thread.run_sync(work, *args, limiter=self._limiter)

    async def change(self, work: Callable[..., T], *args: object) -> T:
        """Work in a thread after which the index may hold more or less, also if it fails."""
        total = -1

        def counted() -> T:
            nonlocal total
            try:
                return work(*args)
            finally:
                total = self.index.total_bytes()

        try:
            return await self.in_thread(counted)
        finally:
            if total >= 0:
                self.indexed_bytes = total

    def path(self, name: str) -> str:
        return f"{self._data}/{name[:2]}/{name}"

    def unlink(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.path(name))

    def is_idle(self, name: str) -> bool:
        """Of a file that the index has."""
        return name not in self.files and name not in self.deleting

    def close(self, file: CacheFile) -> None:
        """What the index has of it is all that is known from now on."""
        if file.indexed and not file.in_memory:
            self.verified_blocks.remember(file)
        del self.files[file.name]
        self.rows.pop(file.name, None)
        file.close()

    async def delete_forgotten(self) -> int:
        """Files that were forgotten and have no user any more go; returns their bytes. All are
        closed before anything is awaited, as two tasks may be here at once; so all must go then."""
        if self.is_saving:
            return 0
        gone = [file for file in self.files.values() if not file.indexed and file.users == 0]
        freed = sum(file.cached_bytes for file in gone)
        names = [file.name for file in gone]
        in_index = [name for name in names if name in self.rows]
        self.deleting.update(names)
        for file in gone:
            self.close(file)
        try:
            with trio.CancelScope(shield=True):
                for name in names:
                    await self.in_thread(self.unlink, name)
                if in_index:
                    for file in gone:
                        self.record_cache.invalidate(file.origin, file.key)
                    await self.change(self.index.delete, in_index)
        finally:
            self.deleting.difference_update(names)
        return freed

    @property
    def idle_bytes(self) -> int:
        in_use = sum(row.cached_bytes for row in self.rows.values())
        return max(0, self.indexed_bytes - in_use)

    @property
    def used_bytes(self) -> int:
        """Looks at every open file: not for every read."""
        return (
            self.spooled_bytes
            + self.idle_bytes
            + sum(file.cached_bytes for file in self.files.values() if not file.in_memory)
        )

    def under(self, origin: str, key: bytes) -> Iterator[CacheFile]:
        """The open files at and below `key`."""
        below = key + b"/" if key else b""
        for file in list(self.files.values()):
            if file.origin == origin and (file.key == key or file.key.startswith(below)):
                yield file
