"""The content of one open file: what is here, what is dirty, which remote version it stands on.

All handles of a node share one Content. Bytes come from three places: the blocks of the remote
version that are in the cache file, what was written here (dirty), and zeros (holes, and what lies
beyond the remote's old end). `base_size` says how much of the remote's content still counts: it
shrinks with a truncation, so that what was cut off never comes back.

Sections without an await are atomic and marked; there is no lock but the one that keeps uploads of
one file apart. While an upload runs, the remote's version is in motion: fetches wait for its end.
"""

from __future__ import annotations

import errno
import logging
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from hpcfs.cache.fetcher import Fetcher
from hpcfs.cache.file import CacheFile
from hpcfs.cache.ranges import RangeSet
from hpcfs.cache.store import Store
from hpcfs.filesystem.errors import CacheFull, Stale
from hpcfs.transfer import messages as m
from hpcfs.transfer.messages import BLOCK_BYTES
from hpcfs.writeback.journal import Unconfirmed

if TYPE_CHECKING:
    from hpcfs.filesystem.namespace import Namespace
    from hpcfs.filesystem.tree import Node

log = logging.getLogger(__name__)

FETCH_TIMEOUT = 90.0
UPLOAD_TIMEOUT = 120.0
"""Seconds without progress. Ranges share a link that may be slow; a dead link is noticed earlier,
by the connection's keepalive."""
_GROWTH_ATTEMPTS = 4
"""A file that is appended to all the time may grow between finding its size and reading."""


@dataclass(frozen=True)
class Snapshot:
    """What an upload brings to the remote."""

    ranges: RangeSet
    size: int
    base_size: int
    attributes: m.Attributes
    was_new: bool
    resized: bool


class Content:
    """Sizes and offsets in bytes. Raises RemoteError and FilesystemError."""

    def __init__(
        self,
        node: Node,
        namespace: Namespace,
        abilities: m.Abilities,
        store: Store,
        file: CacheFile,
        nursery: trio.Nursery,
    ) -> None:
        self.node = node
        self.namespace = namespace
        self.abilities = abilities
        self.handle = namespace.new_handle()
        self.users = 0
        self.file = file
        self.base_size = file.size
        self.growing = False
        """Others append to the file while it is open here."""
        self.held = False
        """The remote has the file open for this content."""
        self.stale = False
        self.closing: trio.Event | None = None
        """Set once the last handle's close is through."""
        self.new = False
        """The remote has no such file yet."""
        self.orphan = False
        """Removed: nothing of it will ever be uploaded."""
        self.resized = False
        self.pending = m.Attributes()
        self.journaled = False
        self.upload_lock = trio.Lock()
        self._uploading: trio.Event | None = None
        self._in_upload = RangeSet()
        self._store = store
        self._fetcher = Fetcher(
            file, self._fetch, self._is_needed, lambda: self.base_size, store.note_fetched, nursery
        )
        self._nursery = nursery

    @property
    def size(self) -> int:
        return self.file.size

    @property
    def version(self) -> bytes:
        return self.file.version

    def is_dirty(self) -> bool:
        """Whether the remote lacks something of this."""
        if self.orphan:
            return False
        return bool(self.file.dirty or self._in_upload or self.new or self.resized or self.pending)

    # --- blocks ---------------------------------------------------------------------------------

    def _is_needed(self, block: int) -> bool:
        return block * BLOCK_BYTES < self.base_size and not self.file.blocks.is_present(block)

    def _blocks(self, offset: int, end: int) -> range:
        return range(offset // BLOCK_BYTES, -(-end // BLOCK_BYTES))

    async def _fetch(self, offset: int, length: int) -> m.Fetched:
        attempts = 0
        while True:
            while self._uploading is not None:
                await self._uploading.wait()
            version, path = self.version, self.node.path
            try:
                fetched = await self._fetch_once(offset, length)
                if self.version == version:
                    return fetched
            except m.Changed:
                attempts += 1
                moved = self.version != version or self.node.path != path
                if attempts > _GROWTH_ATTEMPTS or not (moved or await self._follows()):
                    self.stale = True
                    raise
            except m.CacheDiskFull:
                attempts += 1
                if attempts > 1 or not await self._store.make_room(4 * length):
                    raise

    async def _fetch_once(self, offset: int, length: int) -> m.Fetched:
        request = m.Fetch(
            self.node.path,
            self.version,
            offset,
            length,
            self.file.path,
            self.handle,
            growing=self.growing,
        )
        fetched = await self.namespace.call(request, m.Fetched, FETCH_TIMEOUT)
        self.held = True
        return fetched

    async def revalidate(self) -> m.Entry | None:
        """Ask the remote for the very file that is open here, whatever its name is now.

        A file that was appended to goes on with its longer version; only the same remote file
        counts (the remote's own handle tells) and only growth. Any other change makes the content
        stale. None where the remote can't tell: it holds no file open, or has none of this version.
        """
        if not self.abilities.handles:
            return None
        if not self.held:
            try:
                await self._fetch_once(0, 0)
            except (m.Changed, m.NotFound):
                return None
        wanted = m.StatOpen(self.handle)
        entry: m.Entry | None = await self.namespace.call(wanted, m.Entry | None)  # type: ignore[arg-type]
        if entry is None:
            self.held = False
        elif entry.version != self.version and not self.is_dirty() and self._uploading is None:
            if entry.size > self.size:
                self._adopt_growth(entry)
            else:
                self.stale = True
        return entry

    async def _follows(self) -> bool:
        """Whether to fetch again after the remote said that the version changed."""
        if self.is_dirty():
            return False
        entry = await self.revalidate()
        return entry is not None and entry.version == self.version

    def _adopt_growth(self, entry: m.Entry) -> None:
        log.debug("%r grew from %d to %d bytes", self.node.path, self.size, entry.size)
        self.file.evict(list(self.file.blocks.present()))
        self.file.version = entry.version
        self.file.size = self.base_size = entry.size
        self.growing = True

    async def fetch_all(self, limit: int | None = None) -> None:
        """Bring what is missing into the cache, or nothing if that is more than `limit` bytes."""
        blocks = self._blocks(0, self.base_size)
        if limit is not None:
            missing = sum(1 for block in blocks if self._is_needed(block))
            if missing * BLOCK_BYTES > limit:
                return
        await self._fetcher.ensure(blocks)

    def prefetch(self, start: int, end: int) -> None:
        self._fetcher.prefetch(self._blocks(start, min(end, self.base_size)))

    # --- reading --------------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer only at the end of the file."""
        end = min(offset + length, self.size)
        if offset >= end:
            return b""
        blocks = self._blocks(offset, end)
        while True:
            try:
                await self._fetcher.ensure(blocks)
            except m.Changed as error:
                raise Stale(error.message) from None
            if untrusted := [block for block in blocks if self._is_untrusted(block)]:
                await self._verify(untrusted)
                continue
            data = self.file.read_now(offset, end - offset)
            if data is None:
                data = await trio.to_thread.run_sync(self.file.read, offset, end - offset)
                if any(self._is_needed(block) for block in blocks):
                    continue  # evicted meanwhile: what was read may be a hole
            return data

    def _is_untrusted(self, block: int) -> bool:
        blocks = self.file.blocks
        return blocks.is_present(block) and not blocks.is_trusted(block)

    async def _verify(self, blocks: list[int]) -> None:
        """Compare checksums of what an earlier mount left; a block that fails is fetched anew."""
        for block in blocks:
            found = await trio.to_thread.run_sync(self.file.compute_checksum, block)
            if not self._is_untrusted(block):
                continue
            if found == self.file.blocks.checksum(block):
                self.file.blocks.trust(block)
            else:
                log.warning("block %d of %r was damaged in the cache", block, self.node.path)
                self.file.evict([block])

    # --- writing --------------------------------------------------------------------------------

    async def write(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        await self._prepare(offset, end)
        try:
            self._write_now(offset, data)
        except CacheFull:
            if not await self._store.make_room(4 * len(data) + BLOCK_BYTES):
                raise
            await self._prepare(offset, end)
            self._write_now(offset, data)

    async def _prepare(self, offset: int, end: int) -> None:
        """Make it safe to write [offset, end): what remains of partly covered blocks is here, and
        no fetch under way will overwrite the new bytes. Nothing is awaited after the last check."""
        covered = self._blocks(offset, end)
        ends = {covered[0], covered[-1]}
        while True:
            if missing := [block for block in ends if self._is_edge(block, offset, end)]:
                for block in missing:
                    await self._fetcher.ensure(range(block, block + 1))
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
        end = offset + len(data)
        old_size = self.size
        if end > old_size:
            self.file.resize(end)
        try:
            self.file.write(offset, data)
        except OSError as error:
            for block in self._blocks(offset, end):
                if not self.file.dirty.overlaps(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES):
                    self.file.blocks.drop(block)
            self.file.resize(old_size)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CacheFull("the local disk with the cache is full") from None
            raise
        self.file.mark_written(offset, end)

    async def truncate(self, size: int) -> None:
        await self._fetcher.settle()
        # No await from here: atomic.
        if size == self.size and not self.new:
            return
        self.file.resize(size)
        self.base_size = min(self.base_size, size)
        self.resized = True

    # --- uploading (writeback/uploader.py calls these) --------------------------------------------

    async def complete(self) -> None:
        if not self.abilities.partial_writes:
            await self.fetch_all()

    def unconfirmed(self, reason: str = "") -> Unconfirmed:
        ranges = [*self.file.dirty, *self._in_upload]
        return Unconfirmed(
            self.file.name,
            self.namespace.name,
            self.node.path,
            self.size,
            self.base_size,
            sorted(ranges),
            self.file.path,
            reason,
        )

    async def send(self, snapshot: Snapshot, *, sync: bool) -> m.Entry:
        entry = self.node.entry
        times = m.Attributes(atime_ns=entry.atime_ns, mtime_ns=entry.mtime_ns)
        request = m.Upload(
            self.node.path,
            self.file.path,
            snapshot.size,
            snapshot.base_size,
            [(start, end - start) for start, end in snapshot.ranges],
            merge_attributes(times, snapshot.attributes),
            stat.S_IMODE(entry.mode),
            sync,
        )
        return await self.namespace.call(request, m.Entry, UPLOAD_TIMEOUT)

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
        snapshot = Snapshot(
            self.file.dirty, self.size, self.base_size, self.pending, self.new, self.resized
        )
        self.file.dirty = RangeSet()
        self._in_upload = snapshot.ranges
        self.pending = m.Attributes()
        self.resized = False
        self.base_size = self.size
        self._uploading = trio.Event()
        return snapshot

    def end_upload(self, snapshot: Snapshot, entry: m.Entry | None) -> None:
        """`entry` is the file on the remote now, or None if the upload failed."""
        assert self._uploading is not None
        if entry is None:
            for start, end in snapshot.ranges:
                self.file.dirty.add(start, min(end, self.size))
            self.pending = merge_attributes(snapshot.attributes, self.pending)
            self.resized = self.resized or snapshot.resized
            self.base_size = min(self.base_size, snapshot.base_size)
        else:
            self.file.version = entry.version
            self.new = False
            self.growing = False
        self._in_upload = RangeSet()
        self._uploading.set()
        self._uploading = None


def merge_attributes(older: m.Attributes, newer: m.Attributes) -> m.Attributes:
    """The newer values where both have one."""
    return m.Attributes(
        **{
            field: getattr(older, field) if value is None else value
            for field in m.Attributes.__struct_fields__
            for value in [getattr(newer, field)]
        }
    )
