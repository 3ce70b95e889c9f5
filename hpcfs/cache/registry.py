"""The shared state of one cache directory: its index, and the files that are open.

The state of an open file is in memory, and its record in the index lags behind; other files are
*idle*, and only the index knows them. A file becomes open or idle only under the lock `lookup`, so
that one task does not open a file that another evicts.

`indexed_bytes` and `rows` describe the same moment whenever a task looks: the total comes back with
the change (`change`), and code that changed the index updates `rows` before its next await. A sum
taken in between would be too small, and eviction would believe it.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import trio

from hpcfs.cache.file import CacheFile
from hpcfs.cache.index import Index, Record
from hpcfs.cache.record_cache import RecordCache
from hpcfs.cache.verified_blocks import VerifiedBlocks
from hpcfs.model.troubles import Troubles

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """The index's fields of an open file, to tell whether its record must be saved again."""

    key: bytes
    version: bytes
    size: int
    cached_bytes: int
    last_used: float
    pinned: bool

    @classmethod
    def of(cls, file: CacheFile | Record) -> Row:
        """Return the row of a file or a record."""
        return cls(
            file.key, file.version, file.size, file.cached_bytes, file.last_used, file.pinned
        )


class Registry:
    """The open files and the index of one cache directory."""

    def __init__(self, directory: Path, index: Index, troubles: Troubles | None = None) -> None:
        self.directory = directory
        self.troubles = troubles or Troubles()
        self.index = index
        self.files: dict[str, CacheFile] = {}
        """All open files, by name."""
        self.rows: dict[str, Row] = {}
        """The index's rows of open files, by name."""
        self.indexed_bytes = index.total_bytes()
        """The index's last total of cached bytes, open files included."""
        self._generation = index.generation
        self.index_was_lost = trio.Event()
        """Set, and replaced, when an empty index took the place of another one while it was in use:
        the idle files are strays then."""
        self.spooled_bytes = 0
        """Bytes of long listings, in temporary files beside the cache's."""
        self.lookup = trio.Lock()
        self.record_cache = RecordCache()
        self.verified_blocks = VerifiedBlocks()
        self.is_saving = False
        """Whether open files are being saved to the index: none may be closed meanwhile."""
        self.deleting: set[str] = set()
        """Names of files that are closed and about to be deleted, but perhaps still in the index:
        not to be opened again."""
        self.reserved: set[str] = set()
        """Names in data/ that are neither open nor in the index, and are no strays all the same."""
        self._data = str(directory / "data")
        self._limiter = trio.CapacityLimiter(1)

    async def in_thread(self, work: Callable[..., T], *args: object) -> T:
        """Run disk work in a thread, one piece at a time: the index serves one caller."""
        try:
            return await trio.to_thread.run_sync(work, *args, limiter=self._limiter)
        finally:
            if self._generation != self.index.generation:
                self._note_lost_index()

    def _note_lost_index(self) -> None:
        """The index is empty now: what is open is saved anew, the rest is forgotten."""
        self._generation = self.index.generation
        self.rows.clear()
        self.indexed_bytes = 0
        self.record_cache.invalidate_all()
        for file in self.files.values():
            file.blocks.touch_all()
        self.index_was_lost.set()
        self.index_was_lost = trio.Event()

    @asynccontextmanager
    async def reserving(self, name: str) -> AsyncIterator[None]:
        """Keep a file of this name, which the block makes, from being deleted."""
        await self.in_thread(self.reserved.add, name)  # after a deletion that is under way
        try:
            yield
        finally:
            self.reserved.discard(name)

    async def change(self, work: Callable[..., T], *args: object) -> T:
        """Run work in a thread that may change the index's totals, also if it fails."""
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
        """Return the path of a cache file."""
        return f"{self._data}/{name[:2]}/{name}"

    def unlink(self, name: str) -> None:
        """Delete a cache file, if it exists, and unless the name was taken up again meanwhile: what
        was kept may come back while the file that it was is still to be deleted."""
        if name in self.reserved or name in self.files:
            return
        with suppress(FileNotFoundError):
            os.unlink(self.path(name))

    def is_idle(self, name: str) -> bool:
        """Return whether a file of the index is idle: neither open nor being deleted."""
        return name not in self.files and name not in self.deleting

    def close(self, file: CacheFile) -> None:
        """Close a file; from now on only the index knows it."""
        if file.indexed and not file.in_memory:
            self.verified_blocks.remember(file)
        del self.files[file.name]
        self.rows.pop(file.name, None)
        file.close()

    async def delete_forgotten(self) -> int:
        """Delete forgotten files without users; return their bytes. All are closed before the first
        await, since two tasks may run this at once; so all must be deleted then."""
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
        """The cached bytes of idle files."""
        in_use = sum(row.cached_bytes for row in self.rows.values())
        return max(0, self.indexed_bytes - in_use)

    @property
    def used_bytes(self) -> int:
        """The bytes that the cache occupies. Looks at every open file, so not for every read."""
        return (
            self.spooled_bytes
            + self.idle_bytes
            + sum(file.cached_bytes for file in self.files.values() if not file.in_memory)
        )

    def under(self, origin: str, key: bytes) -> Iterator[CacheFile]:
        """Yield the open files at and below `key`."""
        below = key + b"/" if key else b""
        for file in list(self.files.values()):
            if file.origin == origin and (file.key == key or file.key.startswith(below)):
                yield file
