"""The content of one open file: what is here, what is dirty, which remote version it stands on.

All handles of a node share one Content. Bytes come from three places: the blocks of the remote
version that are in the cache file, what was written here (dirty), and zeros (holes, and what lies
beyond the remote's old end). `base_size` says how much of the remote's content still counts: it
shrinks with a truncation, so that what was cut off never comes back.

This is the writing half; how bytes come from the remote is reading.py's. Sections without an await
are atomic and marked; there is no lock but the one that keeps uploads of one file apart.
"""

from __future__ import annotations

import errno
import logging
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from hpcfs.cache.fetcher import Budget
from hpcfs.cache.file import CacheFile
from hpcfs.cache.ranges import RangeSet
from hpcfs.cache.store import Store
from hpcfs.filesystem.errors import CacheFull, Stale
from hpcfs.filesystem.namespace import Namespace
from hpcfs.filesystem.reading import Place, RemoteContent
from hpcfs.filesystem.snapshot import Snapshot, merge_attributes
from hpcfs.transfer import messages as m
from hpcfs.transfer.messages import BLOCK_BYTES
from hpcfs.writeback.journal import Unconfirmed

log = logging.getLogger(__name__)

UPLOAD_TIMEOUT = 120.0
"""Seconds without progress."""


class Content(RemoteContent):
    """Sizes and offsets in bytes. Raises RemoteError and FilesystemError."""

    def __init__(
        self,
        place: Place,
        namespace: Namespace,
        abilities: m.Abilities,
        store: Store,
        file: CacheFile,
        nursery: trio.Nursery,
        budget: Budget,
        now: Callable[[], float],
    ) -> None:
        super().__init__(place, namespace, abilities, store, file, nursery, budget, now)
        self.users = 0
        self.closing: trio.Event | None = None
        """While the last handle closes; set once it is through."""
        self.retired = False
        """Closed for good."""
        self.new = False
        """The remote has no such file yet."""
        self.resized = False
        self.pending = m.Attributes()
        self.journaled = False
        self.writers = 0
        self.upload_lock = trio.Lock()
        self._in_upload = RangeSet()

    def is_dirty(self) -> bool:
        if self.orphan:
            return False
        in_motion = self._in_motion is not None
        return bool(in_motion or self.file.dirty or self.new or self.resized or self.pending)

    # --- writing --------------------------------------------------------------------------------

    async def write(self, offset: int, data: bytes) -> None:
        if not data:
            return
        end = offset + len(data)
        await self._prepare(offset, end)
        try:
            self._write_now(offset, data)
        except CacheFull:
            if not await self._store.make_room(4 * len(data) + BLOCK_BYTES):
                raise
            await self._prepare(offset, end)
            self._write_now(offset, data)
        self._store.note_added(len(data))

    async def _prepare(self, offset: int, end: int) -> None:
        """Make it safe to write [offset, end): what remains of partly covered blocks is here, and
        no fetch under way will overwrite the new bytes. Nothing is awaited after the last check."""
        covered = self._blocks(offset, end)
        ends = {covered[0], covered[-1]}
        while True:
            if missing := [block for block in ends if self._is_edge(block, offset, end)]:
                for block in missing:
                    await self._ensure(range(block, block + 1))
            elif untrusted := [block for block in ends if self._is_untrusted(block)]:
                await self._verify(untrusted)
            elif not self._fetcher.is_idle(covered):
                await self._fetcher.settle(covered)
            else:
                return

    def _is_edge(self, block: int, offset: int, end: int) -> bool:
        """Whether bytes of the remote's in this block stay beside the new ones, and are missing."""
        start = block * BLOCK_BYTES
        stop = min(start + BLOCK_BYTES, self.base_size)
        return self._is_needed(block) and (start < offset or end < stop)

    def _write_now(self, offset: int, data: bytes) -> None:
        """No await: atomic."""
        self._check_not_replaced()
        end = offset + len(data)
        old_size = self.size
        if end > old_size:
            self.file.resize(end)
        try:
            self.file.write(offset, data)
        except OSError as error:
            self._undo_write(offset, end, old_size)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CacheFull("the local disk with the cache is full") from None
            raise
        self.file.mark_written(offset, end)

    def _undo_write(self, offset: int, end: int, old_size: int) -> None:
        """A part may be in the file. In a clean block it goes, and the remote's bytes are fetched
        anew; in a dirty one it stays as if the program had written no more."""
        for block in self._blocks(offset, end):
            start, stop = block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES
            if self.file.dirty.overlaps(start, stop):
                self.file.dirty.add(max(start, offset), min(stop, end))
            else:
                self.file.discard(block)
        self.file.resize(old_size)

    def _check_not_replaced(self) -> None:
        if self.replaced:
            raise Stale("the file was replaced on the remote since it was opened; open it again")

    async def truncate(self, size: int) -> bool:
        """Whether that changed the size."""
        await self._fetcher.settle()
        # No await from here: atomic.
        self._check_not_replaced()
        if size == self.size:
            return False
        self.file.resize(size)
        self.base_size = min(self.base_size, size)
        self.resized = True
        return True

    # --- uploading (writeback/uploader.py calls these) --------------------------------------------

    async def complete(self) -> None:
        """Where the remote takes only whole files, all of it must be here, and undamaged."""
        if self.abilities.partial_writes:
            return
        blocks = self._blocks(0, self.base_size)
        while True:
            await self.fetch_all()
            untrusted = [block for block in blocks if self._is_untrusted(block)]
            if not untrusted:
                return
            await self._verify(untrusted)

    def unconfirmed(self, reason: str = "") -> Unconfirmed:
        ranges = [*self.file.dirty, *self._in_upload]
        return Unconfirmed(
            self.file.name,
            self.namespace.name,
            self.place.path,
            self.size,
            self.base_size,
            sorted(ranges),
            self.file.path,
            reason,
        )

    async def send(self, snapshot: Snapshot, *, sync: bool) -> m.Entry:
        other_version = await self._meets_other_version(snapshot)
        entry = self.place.entry
        times = m.Attributes(atime_ns=entry.atime_ns, mtime_ns=entry.mtime_ns)
        request = m.Upload(
            self.place.path,
            self.file.path,
            snapshot.size,
            snapshot.base_size,
            [(start, end - start) for start, end in snapshot.ranges],
            merge_attributes(times, snapshot.attributes),
            stat.S_IMODE(entry.mode),
            sync,
        )
        answer = await self.namespace.call(request, m.Entry, UPLOAD_TIMEOUT)
        if other_version:
            log.warning("%r was changed by others too: what both wrote is in it", self.place.path)
            self._drop_clean()
        return answer

    async def _meets_other_version(self, snapshot: Snapshot) -> bool:
        """Whether ranges are about to be written into a version that is not the one in the cache:
        what is cached of that one is not what the file will have beside them."""
        if not self.abilities.partial_writes or not min(snapshot.base_size, snapshot.size):
            return False
        try:
            return (await self.namespace.stat(self.place.path)).version != self.version
        except m.NotFound:
            return True

    def _drop_clean(self) -> None:
        blocks = self.file.blocks.present()
        dirty = self.file.dirty
        is_clean = [b for b in blocks if not dirty.overlaps(b * BLOCK_BYTES, (b + 1) * BLOCK_BYTES)]
        self.file.evict(is_clean)

    @contextmanager
    def in_motion(self) -> Iterator[None]:
        """While the remote renames the file: fetches wait for its end, or try again after it."""
        self._in_motion = trio.Event()
        try:
            yield
        finally:
            self._in_motion.set()
            self._in_motion = None

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """While the upload reads the cache file, nothing in it is evicted."""
        self.file.pins += 1
        try:
            yield
        finally:
            self.file.pins -= 1

    async def begin_upload(self) -> Snapshot:
        """What is dirty now is on its way; what is written from now on is dirty anew."""
        await self._fetcher.settle()
        # No await from here: atomic.
        snapshot = Snapshot(self.file.dirty, self.size, self.base_size, self.pending, self.resized)
        self.file.dirty = RangeSet()
        self._in_upload = snapshot.ranges
        self.pending = m.Attributes()
        self.resized = False
        self.base_size = self.size
        self._in_motion = trio.Event()
        return snapshot

    def end_upload(self, snapshot: Snapshot, entry: m.Entry | None) -> None:
        """`entry` is the file on the remote now, or None if the upload failed."""
        assert self._in_motion is not None
        if entry is None:
            for start, end in snapshot.ranges:
                self.file.dirty.add(start, min(end, self.size))
            if not self.abilities.partial_writes:  # perhaps it replaced the old version: all of
                self.file.dirty.add(0, min(snapshot.size, self.size))  # this one is here only
            self.pending = merge_attributes(snapshot.attributes, self.pending)
            self.resized = self.resized or snapshot.resized
            self.base_size = min(self.base_size, snapshot.base_size)
        else:
            self.file.version = entry.version
            self.new = False
            self.growing = False
        self._in_upload = RangeSet()
        self._in_motion.set()
        self._in_motion = None
        self._store.check_bound()
