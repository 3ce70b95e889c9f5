"""The cache on disk: its directory, its lock, the files in use, the bound on its size.

A cache directory belongs to one mount at a time (`flock`, so a killed daemon holds nothing). In it:

    lock          who holds the cache: pid and mount point
    index.db      what the cache files hold (cache/index.py)
    data/ab/...   cache files (cache/file.py), named at random and never reused
    journal.db    what is not on the remote yet (writeback/journal.py)
    kept/         files that could not be uploaded

Files in use are known in memory and written to the index by `save`, some time later and once more
at the end; all SQLite and disk work runs in one worker thread at a time. Eviction takes whole files
that nobody uses, least recently used first, then clean blocks of files in use (invariant 3: never
dirty ones).
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from hpcfs.cache.file import CacheFile
from hpcfs.cache.index import Index, Record
from hpcfs.transfer.messages import BLOCK_BYTES

log = logging.getLogger(__name__)

T = TypeVar("T")
_LOW_WATER = 0.95
"""Eviction makes this much more room than it must, so that it doesn't run for every block."""
_VICTIMS_AT_ONCE = 200


class CacheUnusable(Exception):
    """The cache directory can't be used; the message is a sentence for the user."""


class Store:
    """Sizes in bytes. Use `Store.open`, which may raise CacheUnusable."""

    def __init__(self, directory: Path, max_bytes: int, lock_fd: int, index: Index) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self._lock_fd = lock_fd
        self._index = index
        self._limiter = trio.CapacityLimiter(1)
        self._active: dict[tuple[str, bytes], CacheFile] = {}
        self._unsaved: dict[str, CacheFile] = {}
        self._saving: dict[str, CacheFile] = {}
        """What `save` is just telling the index: neither in `_unsaved` nor to be touched."""
        self._idle_bytes = index.total_bytes()
        self._added_bytes = 0
        self._evict_wanted = trio.Event()

    @classmethod
    def open(cls, directory: Path, max_bytes: int, holder: str) -> Store:
        """`holder` names the mount for whoever finds the cache locked."""
        try:
            (directory / "data").mkdir(mode=0o700, parents=True, exist_ok=True)
            lock_fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CacheUnusable(
                f"the cache directory {directory} can't be used: {error.strerror}"
            ) from None
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = os.pread(lock_fd, 4096, 0).decode(errors="replace").strip()
            os.close(lock_fd)
            raise CacheUnusable(
                f"the cache {directory} is in use by {held or 'another mount'}"
            ) from None
        try:
            os.ftruncate(lock_fd, 0)
            os.pwrite(lock_fd, holder.encode(), 0)
            index = Index(directory / "index.db")
        except OSError as error:
            os.close(lock_fd)
            raise CacheUnusable(
                f"the cache directory {directory} can't be written: {error.strerror}"
            ) from None
        return cls(directory, max_bytes, lock_fd, index)

    async def in_thread(self, work: Callable[..., T], *args: object) -> T:
        """Disk work, one piece at a time."""
        return await trio.to_thread.run_sync(work, *args, limiter=self._limiter)

    # --- files in use ---------------------------------------------------------------------------

    async def acquire(self, origin: str, key: bytes, version: bytes, size: int) -> CacheFile:
        """The cache file of this version, with what an earlier mount left in it.

        It has one user at a time: bytes that one fetches must not meet what another writes. Where
        it is in use (a folder that two namespaces show), the newer user gets a file of its own.
        """
        file = self._in_use(origin, key, version, size)
        if file is None:
            record = await self.in_thread(self._index.find, origin, key)
            file = self._in_use(origin, key, version, size)  # somebody may have been faster
            if file is None:
                usable = record and record.version == version and record.size == size
                file = self._reopen(record) if record and usable else None
                file = file or self.create(origin, key, version, size)
                self.adopt(file)
        file.users += 1
        file.last_used = time.time()
        return file

    def _in_use(self, origin: str, key: bytes, version: bytes, size: int) -> CacheFile | None:
        file = self._active.get((origin, key))
        if file and file.users == 0 and file.version == version and file.size == size:
            return file
        return None

    def _reopen(self, record: Record) -> CacheFile | None:
        if record.name in self._unsaved or record.name in self._saving:
            return None
        path = self._data_path(record.name)
        if not path.exists():
            return None
        file = CacheFile(
            str(path), record.name, record.origin, record.key, record.version, record.size
        )
        for number, checksums in record.chunks.items():
            file.blocks.load(number, checksums)
        self._idle_bytes -= record.cached_bytes
        self._unsaved[file.name] = file
        return file

    def create(self, origin: str, key: bytes, version: bytes, size: int) -> CacheFile:
        """An empty cache file. Raises OSError when the disk has no room for it."""
        name = secrets.token_hex(12)
        path = self._data_path(name)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        file = CacheFile(str(path), name, origin, key, version, size)
        self._unsaved[name] = file
        return file

    def adopt(self, file: CacheFile) -> None:
        """`file` is what its key means from now on; another version that is in use is not."""
        other = self._active.get((file.origin, file.key))
        if other is not None and other is not file:
            self.forget(other)
        self._active[file.origin, file.key] = file

    def release(self, file: CacheFile) -> None:
        """A user is done. The file is closed once `save` has told the index of it."""
        file.users -= 1
        file.last_used = time.time()
        self._unsaved[file.name] = file

    def forget(self, file: CacheFile) -> None:
        """What the file holds belongs to nothing any more; it goes when its last user does."""
        file.indexed = False
        self._unsaved[file.name] = file
        if self._active.get((file.origin, file.key)) is file:
            del self._active[file.origin, file.key]

    def _data_path(self, name: str) -> Path:
        return self.directory / "data" / name[:2] / name

    # --- names change -----------------------------------------------------------------------------

    async def move(self, origin: str, key: bytes, target: bytes) -> None:
        """The remote renamed `key` (a file, or a directory and all below it)."""
        self._forget_under(origin, target)
        for file in self._under(origin, key):
            del self._active[origin, file.key]
            file.key = target + file.key[len(key) :]
            self._active[origin, file.key] = file
            self._unsaved[file.name] = file
        await self._drop_names(await self.in_thread(self._index.move, origin, key, target))

    async def remove(self, origin: str, key: bytes) -> None:
        """The remote removed `key`."""
        self._forget_under(origin, key)
        await self._drop_names(await self.in_thread(self._index.remove, origin, key))

    async def renew_version(self, origin: str, key: bytes, old: bytes, new: bytes) -> None:
        """The same content has another version now (its mtime was set)."""
        file = self._active.get((origin, key))
        if file is not None:
            if file.version == old:
                file.version = new
                self._unsaved[file.name] = file
            return
        await self.in_thread(self._index.renew_version, origin, key, old, new)

    def _forget_under(self, origin: str, key: bytes) -> None:
        for file in self._under(origin, key):
            self.forget(file)

    def _under(self, origin: str, key: bytes) -> list[CacheFile]:
        below = key + b"/"
        return [
            file
            for (its_origin, its_key), file in self._active.items()
            if its_origin == origin and (its_key == key or its_key.startswith(below))
        ]

    async def _drop_names(self, names: list[str]) -> None:
        for name in names:
            file = self._unsaved.get(name) or self._saving.get(name)
            if file is None:
                await self.in_thread(self._unlink, name)
            elif self._active.get((file.origin, file.key)) is not file:
                self.forget(file)

    def _unlink(self, name: str) -> None:
        self._data_path(name).unlink(missing_ok=True)

    # --- saving -----------------------------------------------------------------------------------

    async def save(self) -> None:
        """Tell the index what changed, and close the files that nobody uses.

        Raises OSError or sqlite3.Error when the cache's disk fails; nothing is forgotten then.
        """
        if self._saving or not self._unsaved:
            return
        batch, self._unsaved = self._unsaved, {}
        self._saving = batch
        try:
            replaced = await self._save_records(batch)
        except BaseException:
            for file in batch.values():
                file.blocks.touch_all()
            self._unsaved = batch | self._unsaved
            raise
        finally:
            self._saving = {}
        for file in batch.values():
            if file.users > 0:
                self._unsaved[file.name] = file
            elif not file.indexed:
                self._delete_now(file)
            elif file.name not in self._unsaved:
                self._retire(file)
        await self._drop_names(replaced)
        total = await self.in_thread(self._index.total_bytes)
        self._idle_bytes = max(0, total - self._active_bytes())
        self.check_bound()

    async def _save_records(self, batch: dict[str, CacheFile]) -> list[str]:
        for file in batch.values():
            if file.indexed:
                await self._sum_blocks(file)
        records = [self._record(file) for file in batch.values() if file.indexed]
        return await self.in_thread(self._index.save, records)

    def _retire(self, file: CacheFile) -> None:
        if self._active.get((file.origin, file.key)) is file:
            del self._active[file.origin, file.key]
        file.close()

    def _delete_now(self, file: CacheFile) -> None:
        if self._active.get((file.origin, file.key)) is file:
            del self._active[file.origin, file.key]
        file.close()
        self._unlink(file.name)

    async def _sum_blocks(self, file: CacheFile) -> None:
        """Checksums of what was written here and is on the remote; a block written meanwhile stays
        unsummed. What is being uploaded is not of the version that the index would give it."""
        if file.dirty or file.pins:
            return
        for block in file.blocks.unsummed():
            checksum = await self.in_thread(file.compute_checksum, block)
            start = block * BLOCK_BYTES
            if file.pins or file.dirty.overlaps(start, start + BLOCK_BYTES):
                return
            if file.blocks.is_present(block):
                file.blocks.set_checksum(block, checksum)

    def _record(self, file: CacheFile) -> Record:
        return Record(
            file.name,
            file.origin,
            file.key,
            file.version,
            file.size,
            file.cached_bytes,
            file.last_used,
            file.blocks.take_changed(),
        )

    async def close(self) -> None:
        try:
            await self.save()
        finally:
            for file in list(self._active.values()):
                self._retire(file)
            self._index.close()
            os.close(self._lock_fd)

    async def remove_strays(self) -> None:
        """Delete cache files that the index doesn't know: what a killed daemon had begun. Those
        that the journal knows were moved to kept/ when it was opened."""
        known = await self.in_thread(self._index.names)
        for folder in await self.in_thread(lambda: sorted((self.directory / "data").iterdir())):
            for path in await self.in_thread(lambda folder=folder: list(folder.iterdir())):
                name = path.name
                if name not in known and not self._is_in_use(name):
                    log.info("removing the stray cache file %s", name)
                    await self.in_thread(partial(path.unlink, missing_ok=True))

    def _is_in_use(self, name: str) -> bool:
        return name in self._unsaved or name in self._saving

    # --- the bound --------------------------------------------------------------------------------

    def _active_bytes(self) -> int:
        return sum(file.cached_bytes for file in self._active.values())

    @property
    def used_bytes(self) -> int:
        return self._idle_bytes + self._active_bytes()

    def note_added(self, length: int) -> None:
        """`length` bytes were fetched or written; eviction starts when that may be too much."""
        self._added_bytes += length
        if self._added_bytes > min(64 * BLOCK_BYTES, self.max_bytes // 20):
            self._added_bytes = 0
            self.check_bound()

    def check_bound(self) -> None:
        """Start to evict if there is too much, perhaps only now clean."""
        if self.used_bytes > self.max_bytes:
            self._evict_wanted.set()

    async def evict_forever(self) -> None:
        """Also on a disk that fails: then the next bytes that come are the next attempt."""
        while True:
            await self._evict_wanted.wait()
            self._evict_wanted = trio.Event()
            try:
                await self.make_room(int(self.used_bytes - self.max_bytes * _LOW_WATER))
            except (OSError, sqlite3.Error) as error:
                log.error("the cache can't be kept small: %s", error)  # noqa: TRY400

    async def make_room(self, wanted: int) -> int:
        """Evict at least `wanted` bytes if that can be done; returns the bytes evicted."""
        freed = await self._evict_idle(wanted)
        if freed < wanted:
            freed += self._evict_blocks(wanted - freed)
        return freed

    async def _evict_idle(self, wanted: int) -> int:
        freed, after = 0, -1.0
        while freed < wanted:
            oldest = await self.in_thread(self._index.oldest, after, _VICTIMS_AT_ONCE)
            if not oldest:
                break
            victims = []
            for name, length, after in oldest:  # noqa: B007 - the last one is where to go on
                if freed < wanted and not self._is_in_use(name):
                    victims.append(name)
                    freed += length
            # Files first: a full disk takes no change of the index, and a row may lack its file.
            await self._drop_names(victims)
            try:
                await self.in_thread(self._index.delete, victims)
            except sqlite3.Error as error:
                log.warning("the cache's index still names evicted files: %s", error)
        self._idle_bytes = max(0, self._idle_bytes - freed)
        return freed

    def _evict_blocks(self, wanted: int) -> int:
        freed = 0
        for file in sorted(self._active.values(), key=lambda file: file.last_used):
            if freed >= wanted:
                break
            if file.pins:
                continue
            blocks = []
            for block in file.blocks.present():
                start = block * BLOCK_BYTES
                if freed >= wanted or file.dirty.overlaps(start, start + BLOCK_BYTES):
                    continue
                blocks.append(block)
                freed += BLOCK_BYTES
            file.evict(blocks)
        return freed
