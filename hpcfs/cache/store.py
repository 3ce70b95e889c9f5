"""The cache on disk: its directory, its lock, the files in use.

A cache directory belongs to one mount at a time (`flock`, so a killed daemon holds nothing). In it:

    lock          who holds the cache: pid and mount point
    index.db      the index of the cache files (cache/index.py); index.db.damaged: a former one
    data/ab/...   cache files (cache/file.py), named at random and never reused
    journal.db    data that is not on the remote yet (writeback/journal.py)
    pending/      second names of cache files with such data (writeback/acknowledged.py)
    kept/         files that could not be uploaded

The state of files in use is in memory; `save` writes it to the index, some time later and once more
at the end. All SQLite work runs in one worker thread at a time. eviction.py decides what is deleted
when the cache is too large.
"""

from __future__ import annotations

import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import trio

from hpcfs.cache.directory import CacheDirectory
from hpcfs.cache.eviction import Eviction
from hpcfs.cache.file import CacheFile
from hpcfs.cache.index import Index, Record
from hpcfs.cache.memory_files import MemoryFiles
from hpcfs.cache.record_cache import MAX_FILES
from hpcfs.cache.registry import Registry, Row
from hpcfs.model import paths
from hpcfs.model.entries import BLOCK_BYTES
from hpcfs.model.errors import TooManyOpen
from hpcfs.model.troubles import Troubles
from hpcfs.system import limits
from hpcfs.system.disk import MinFree

log = logging.getLogger(__name__)

T = TypeVar("T")
_SUMS_AT_ONCE = 32
"""Blocks summed by one call of a thread: 2 MiB."""


def _most_files(limit: int) -> int:
    """Return how many of the process's descriptors may be cache files: sockets, databases, logs and
    listings need some."""
    return limit - max(64, min(512, limit // 4))


class Store:
    """The open cache; sizes are in bytes. Make one with `Store.open`, which may raise
    CacheUnusable."""

    def __init__(self, registry: Registry, eviction: Eviction, place: CacheDirectory) -> None:
        self.registry = registry
        self.eviction = eviction
        self.max_bytes = eviction.max_bytes
        self.directory = registry.directory
        self.troubles = registry.troubles
        self._index = registry.index
        self.place = place
        self._active: dict[tuple[str, bytes], CacheFile] = {}
        """The current open file of each (origin, key)."""
        self._save_lock = trio.Lock()
        self.memory = MemoryFiles(registry)
        self.note_added = eviction.note_added
        self.may_prefetch = eviction.may_prefetch
        self.note_cleaned = eviction.note_cleaned
        self.make_room = eviction.make_room
        self.evict_forever = eviction.run

    @classmethod
    def open(
        cls, directory: Path, max_bytes: int, holder: str, min_free: MinFree | None = None
    ) -> Store:
        """Open and lock the cache directory. `holder` describes the mount to others who find the
        cache locked. Raises CacheUnusable."""
        place = CacheDirectory.take(directory, holder)
        troubles = Troubles()
        registry = Registry(directory, Index(directory / "index.db", troubles), troubles)
        return cls(registry, Eviction(registry, max_bytes, min_free or MinFree()), place)

    @property
    def used_bytes(self) -> int:
        """The bytes that the cache occupies."""
        return self.registry.used_bytes

    def spool(self, length: int) -> bool:
        """Account for `length` bytes of a long listing that are written to the disk, or (negative)
        removed from it. Returns False where all listings together would take more than the cache
        may."""
        if length > 0 and self.registry.spooled_bytes + length > self.max_bytes:
            return False
        self.registry.spooled_bytes += length
        if length > 0:
            self.note_added(length)
        return True

    async def in_thread(self, work: Callable[..., T], *args: object) -> T:
        """Run disk work in a thread, one piece at a time."""
        return await self.registry.in_thread(work, *args)

    # --- files in use ---------------------------------------------------------------------------

    async def acquire(self, origin: str, key: bytes, version: bytes, size: int) -> CacheFile:
        """Return the cache file of this version, with the blocks that are left from earlier use.

        A file has one user at a time: one user's fetched bytes must not overwrite another's written
        ones. Where it is in use (a folder that two namespaces show, two callers that open a file at
        once), the later user gets a file of its own, which is deleted with its use.
        """
        file = self._in_use(origin, key, version, size)
        if file is None:
            await self.make_descriptor()
            lookup = self.registry.lookup
            known = None if lookup.locked() else self.registry.record_cache.find(origin, key)
            if known is not None:
                file = self._take(known.record, origin, key, version, size)
            else:
                async with lookup:
                    record = await self._look_up(origin, key)
                    file = self._in_use(origin, key, version, size)  # another task may be faster
                    file = file or self._take(record, origin, key, version, size)
        file.users += 1
        file.last_used = time.time()
        return file

    async def make_descriptor(self) -> None:
        """Return once one more cache file may be open: files without users are closed for that.

        Raises TooManyOpen.
        """
        most = _most_files(limits.open_files())
        if len(self.registry.files) < most:
            return
        if any(not file.users for file in self.registry.files.values()):
            try:
                await self.save()
            except (OSError, sqlite3.Error) as error:
                log.warning("files that nobody uses are not closed: %s", error)
        if len(self.registry.files) >= most:
            raise TooManyOpen(f"{most} files are open: raise the limit of open files (ulimit -Hn)")

    async def _look_up(self, origin: str, key: bytes) -> Record | None:
        record_cache = self.registry.record_cache
        if record_cache.wants(origin, key):
            stamp, directory = record_cache.stamp, paths.parent(key)
            files = await self.in_thread(self._index.directory, origin, directory, MAX_FILES)
            record_cache.learn(origin, key, files, stamp)
            if files is not None and (key not in files or files[key].is_complete):
                return files.get(key)
        return await self.in_thread(self._index.find, origin, key)

    def in_memory(self, name: str) -> int | None:
        """Return the descriptor of the file in memory that has this name now; None where there is
        none."""
        file = self.registry.files.get(name)
        return file.fd if file is not None and file.in_memory and file.fd >= 0 else None

    def is_open(self, origin: str, key: bytes) -> bool:
        """Whether somebody uses a file of this name now."""
        file = self._active.get((origin, key))
        return file is not None and file.users > 0

    def _in_use(self, origin: str, key: bytes, version: bytes, size: int) -> CacheFile | None:
        file = self._active.get((origin, key))
        if file and file.users == 0 and file.version == version and file.size == size:
            return file
        return None

    def _take(
        self, record: Record | None, origin: str, key: bytes, version: bytes, size: int
    ) -> CacheFile:
        """Return the file of the record, if it is this version; otherwise an empty file. Does not
        await."""
        active = self._active.get((origin, key))
        if active and active.users and active.version == version and active.size == size:
            own = self._create_to_read(origin, key, version, size)
            own.indexed = False  # the older user's file is the one that is kept
            return own
        usable = record and record.version == version and record.size == size
        file = self._reopen(record) if record and usable else None
        file = file or self._create_to_read(origin, key, version, size)
        self.adopt(file)
        return file

    def _create_to_read(self, origin: str, key: bytes, version: bytes, size: int) -> CacheFile:
        """Return a new file; where the disk is full, gone or broken, one in memory."""
        try:
            return self.create(origin, key, version, size)
        except OSError as error:
            self.troubles.tell(
                f"the cache directory {self.directory} takes no files ({error.strerror}):"
                " what is read goes through memory"
            )
            return self.memory.create(origin, key, version, size)

    def _reopen(self, record: Record) -> CacheFile | None:
        if not self.registry.is_idle(record.name):
            return None
        try:
            found = os.stat(self.registry.path(record.name))
        except OSError as error:
            log.debug("the cache file %s can't be used: %s", record.name, error)
            return None
        if found.st_nlink != 1:
            return None  # a kill left it with a second name, in kept/: that one is not ours
        file = self._open_file(record.name, record.origin, record.key, record.version, record.size)
        file.last_used = record.last_used
        trusted = self.registry.verified_blocks.take(record.name, found)
        file.blocks.load(record.chunks, record.blocks, trusted)
        self.registry.rows[file.name] = Row.of(record)
        return file

    def create(self, origin: str, key: bytes, version: bytes, size: int) -> CacheFile:
        """Return a new, empty cache file. Raises OSError where the disk has no room for it."""
        name = secrets.token_hex(12)
        try:
            return self._open_file(name, origin, key, version, size)
        except FileNotFoundError:
            os.mkdir(os.path.dirname(self.registry.path(name)), 0o700)
            return self._open_file(name, origin, key, version, size)

    def _open_file(
        self, name: str, origin: str, key: bytes, version: bytes, size: int
    ) -> CacheFile:
        file = CacheFile(self.registry.path(name), name, origin, key, version, size)
        file.pinned = self._index.is_pinned(origin, key)
        self.registry.files[name] = file
        return file

    async def resume(
        self,
        name: str,
        origin: str,
        key: bytes,
        version: bytes,
        size: int,
        dirty: list[tuple[int, int]],
    ) -> CacheFile:
        """Return the cache file in which an earlier mount left bytes that the remote does not
        have. Its other blocks count as the index has them, once verified. Raises OSError, also
        where there is no such file, and sqlite3.Error."""
        async with self.registry.lookup:
            record = await self.in_thread(self._index.find, origin, key)
            os.stat(self.registry.path(name))  # else it would be made, of zeros
            former = self.registry.files.get(name)  # it was kept meanwhile, and is not closed yet
            if former is not None and not former.users:
                self.registry.close(former)
            file = self._open_file(name, origin, key, version, size)
            if record and (record.name, record.version) == (name, version):
                file.blocks.load(record.chunks, record.blocks)
                self.registry.rows[name] = Row.of(record)
        for start, end in dirty:
            file.mark_written(start, end)
        file.users = 1
        self.adopt(file)
        return file

    def adopt(self, file: CacheFile) -> None:
        """Make `file` the current one of its key; another version that is in use is forgotten."""
        other = self._active.get((file.origin, file.key))
        if other is not None and other is not file:
            self.forget(other)
        self._active[file.origin, file.key] = file

    def release(self, file: CacheFile) -> None:
        """End one use. The file is closed once `save` has written it to the index."""
        file.users -= 1
        file.last_used = time.time()
        if not file.indexed:
            self.note_cleaned()

    def forget(self, file: CacheFile) -> None:
        """Mark the file's content obsolete; it is deleted when its last user releases it."""
        file.indexed = False
        if self._active.get((file.origin, file.key)) is file:
            del self._active[file.origin, file.key]

    # --- names change -----------------------------------------------------------------------------

    async def move(self, origin: str, key: bytes, target: bytes) -> None:
        """Note that the remote renamed `key` (a file, or a directory and all below it)."""
        self._forget_under(origin, target)
        self.registry.record_cache.invalidate_all()
        for file in self._under(origin, key):
            del self._active[origin, file.key]
            file.key = target + file.key[len(key) :]
            self._active[origin, file.key] = file
        await self._drop_names(await self.registry.change(self._index.move, origin, key, target))
        self.mark_pinned(origin, target)

    async def remove(self, origin: str, key: bytes) -> None:
        """Note that the remote removed `key`."""
        self._forget_under(origin, key)
        self.registry.record_cache.invalidate_all()
        await self._drop_names(await self.registry.change(self._index.remove, origin, key))

    async def invalidate(self, origin: str, key: bytes) -> None:
        """Forget a file whose content changed on the remote. The version can't be relied on for
        that: where versions are sizes and seconds, a later one may look like the cached one."""
        self._forget_under(origin, key)
        self.registry.record_cache.invalidate(origin, key)
        record = await self.in_thread(self._index.find, origin, key)
        if record is not None:
            await self.registry.change(self._index.forget, record.name)
            await self._drop_names([record.name])

    async def renew_version(self, origin: str, key: bytes, old: bytes, new: bytes) -> None:
        """Note that the same content has another version now, because its mtime was set."""
        file = self._active.get((origin, key))
        if file is not None:
            if file.version == old:
                file.version = new
            return
        self.registry.record_cache.invalidate(origin, key)
        await self.in_thread(self._index.renew_version, origin, key, old, new)

    def mark_pinned(self, origin: str, key: bytes) -> None:
        """Update whether the open files at and below `key` are pinned."""
        for file in self.registry.under(origin, key):
            file.pinned = self._index.is_pinned(origin, file.key)

    def _forget_under(self, origin: str, key: bytes) -> None:
        for file in self._under(origin, key):
            self.forget(file)

    def _under(self, origin: str, key: bytes) -> list[CacheFile]:
        under = self.registry.under(origin, key)
        return [file for file in under if self._active.get((origin, file.key)) is file]

    async def _drop_names(self, names: list[str]) -> None:
        """Delete or forget files whose records the index has deleted."""
        for name in names:
            self.registry.rows.pop(name, None)
        for name in names:
            file = self.registry.files.get(name)
            if file is None:
                await self.in_thread(self.registry.unlink, name)
            elif self._active.get((file.origin, file.key)) is not file:
                self.forget(file)

    # --- saving -----------------------------------------------------------------------------------

    async def save(self) -> None:
        """Save the changes to the index, and close the files without users.

        Raises OSError or sqlite3.Error where the cache's disk fails; nothing is lost then.
        """
        async with self._save_lock:
            await self._save()

    async def _save(self) -> None:
        self.registry.is_saving = True
        try:
            replaced = await self._save_changes()
        except (OSError, sqlite3.Error):
            self.eviction.recount()  # perhaps for want of room, which others took
            raise
        finally:
            self.registry.is_saving = False
        for file in list(self.registry.files.values()):
            if file.users == 0 and file.indexed and not self._has_news(file):
                self._close_file(file)
        await self.registry.delete_forgotten()
        await self._remove_abandoned()
        await self._drop_names(replaced)
        self.eviction.recount()

    def _has_news(self, file: CacheFile) -> bool:
        """Return whether the file's record in the index is out of date."""
        if file.in_memory:
            return False
        return file.blocks.has_changed or self.registry.rows.get(file.name) != Row.of(file)

    async def _save_changes(self) -> list[str]:
        """Save the records; return the names of files that they replaced in the index."""
        for file in list(self.registry.files.values()):
            if file.indexed and not file.in_memory:
                await self._sum_blocks(file)
        # No await from here to the index's own work.
        files = self.registry.files.values()
        news = [file for file in files if file.indexed and self._has_news(file)]
        if not news:
            return []
        for file in news:
            self.registry.record_cache.invalidate(file.origin, file.key)
        records = [self._record(file) for file in news]
        try:
            replaced = await self.registry.change(self._index.save, records)
        except BaseException:
            for file, record in zip(news, records, strict=True):
                file.blocks.touch(record.chunks)
            raise
        for record in records:
            if record.name in self.registry.files:  # it may have moved to memory meanwhile
                self.registry.rows[record.name] = Row.of(record)
        for name in replaced:
            self.registry.rows.pop(name, None)
        return replaced

    async def _remove_abandoned(self) -> None:
        """Delete the files on the disk that were left for memory, unless the index knows them."""
        names, self.memory.abandoned = self.memory.abandoned, []
        for name in names:
            folder = Path(self.registry.path(name)).parent
            await self.in_thread(self._remove_unknown, folder, [name])

    def _close_file(self, file: CacheFile) -> None:
        if self._active.get((file.origin, file.key)) is file:
            del self._active[file.origin, file.key]
        self.registry.close(file)

    async def _sum_blocks(self, file: CacheFile) -> None:
        """Compute checksums of blocks that were written here and are on the remote. A block written
        meanwhile stays unsummed. A file that is being uploaded is skipped: its content is not of
        the version that the index would record."""
        if file.dirty or file.pins:
            return
        unsummed = file.blocks.unsummed()
        for first in range(0, len(unsummed), _SUMS_AT_ONCE):
            blocks = unsummed[first : first + _SUMS_AT_ONCE]
            name = file.name
            found = await self.in_thread(file.compute_checksums, blocks)
            if file.name != name:
                return  # it moved to memory meanwhile
            for block, checksum in zip(blocks, found, strict=True):
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
            file.blocks.summed,
            file.pinned,
            chunks=file.blocks.take_changed(),
        )

    async def close(self) -> None:
        """Save, close everything and release the lock."""
        try:
            await self.save()
        finally:
            for file in list(self.registry.files.values()):
                self._close_file(file)
            self._index.close()
            self.place.release()

    async def remove_strays_forever(self) -> None:
        """Delete cache files that the index doesn't know, now and whenever it lost them all.

        Raises OSError.
        """
        while True:
            was_lost = self.registry.index_was_lost
            await self.remove_strays()
            await was_lost.wait()

    async def remove_strays(self) -> None:
        """Delete cache files that the index doesn't know, which a killed daemon left. Those that
        the journal knows were moved to kept/ when it was opened. Works on one folder at a time."""
        for folder in await self.in_thread(lambda: sorted((self.directory / "data").iterdir())):
            names = await self.in_thread(os.listdir, folder)
            idle = [name for name in names if name not in self.registry.files]
            await self.in_thread(self._remove_unknown, folder, idle)

    def _remove_unknown(self, folder: Path, names: list[str]) -> None:
        """Delete those of these files that the index doesn't have, in a thread. They were not open
        before their names were listed, so the index will never have them."""
        known = self._index.known(names) | self.registry.reserved
        for name in names:
            if name not in known:
                log.info("removing the stray cache file %s", name)
                (folder / name).unlink(missing_ok=True)
