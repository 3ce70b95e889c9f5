"""The reading half of an open file's content: bringing the remote's bytes, one version of them.

What is fetched comes into the cache file (content/fetcher.py) and is read from there. A file that
others change is never mixed: it is followed where it only grew, and given up otherwise. The writing
half is content/content.py.

Sections without an await are atomic. While an upload or a rename runs, the remote's version is in
motion: fetches wait for its end.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import takewhile
from typing import Protocol

import trio

from hpcfs.cache.file import CacheFile
from hpcfs.cache.store import Store
from hpcfs.content.fetcher import Budget, Fetcher
from hpcfs.content.state import State
from hpcfs.model.capabilities import Capabilities
from hpcfs.model.entries import BLOCK_BYTES, NO_HANDLE, Entry
from hpcfs.model.errors import (
    CacheFileGone,
    CacheFull,
    Changed,
    NotConnected,
    NotFound,
    RemoteError,
    Stale,
)
from hpcfs.protocol import messages as m
from hpcfs.site.namespace import Namespace

log = logging.getLogger(__name__)

FETCH_TIMEOUT = 90.0
"""Seconds without progress. Ranges share a link that may be slow; a dead link is noticed earlier,
by the connection's keepalive."""
WHOLE_AT_OPEN_BYTES = 1024 * 1024
"""A file of this size at most comes with its open(2) where the remote can't hold it open: who
replaces it then does not cut it short for who reads it."""
FETCH_ALL_BYTES = 32 * 1024 * 1024
"""At once, of a file that is needed whole."""
VOUCH_SECONDS = 10.0
"""So long a program that reads from the remote need not ask for the file's attributes too."""
UNSIZED_BYTES = 1024 * 1024
"""Of a file whose size says nothing, at once; larger ones don't tell a wrong size."""
_MOST_VERIFIED = 128
"""Blocks at once, by a thread."""
_GROWTH_ATTEMPTS = 4
"""A file that is appended to all the time may grow between finding its size and reading."""


class Place(Protocol):
    """Where the file is in the tree (tree.Node): its path may change while it is open."""

    ino: int
    entry: Entry
    validated_at: float

    @property
    def path(self) -> bytes: ...


class RemoteContent(ABC):
    """Sizes and offsets in bytes. `base_size` is how much of the remote's content counts. Raises
    RemoteError and FilesystemError."""

    def __init__(
        self,
        place: Place,
        namespace: Namespace,
        capabilities: Capabilities,
        store: Store,
        file: CacheFile,
        nursery: trio.Nursery,
        budget: Budget,
        now: Callable[[], float],
    ) -> None:
        self.place = place
        self.namespace = namespace
        self.capabilities = capabilities
        self.handle = namespace.new_handle()
        self.file = file
        self.base_size = file.size
        self.growing = False
        """Others append to the file while it is open here."""
        self.served = False
        """Somebody may have read bytes of this version here."""
        self.held = False
        """The remote has the file open for this content."""
        self.is_unsized = False
        """The remote's file ends before the size that it tells, and did not change: as in /sys."""
        self.state = State()
        self.needs_disk = False
        """The cache file may not be in memory: it was or will be written to, or shall stay."""
        self._disk_waits = False
        """The last read was not in the page cache: then more of it won't be either."""
        self._verified_to = 0
        self._verify_ahead = 0
        """Blocks, beyond those that a read needs."""
        self._now = now
        self._vouched = 0.0
        """Until when a fetch last renewed what is known of the file, by the tree's clock."""
        self._looked = 0.0
        """When the remote was last asked for all attributes."""
        self._nursery = nursery
        self._store = store
        self._budget = budget
        self._fetcher = Fetcher(
            file,
            self._fetch,
            self._is_needed,
            lambda: self.base_size,
            self._note_added,
            nursery,
            budget,
        )

    @abstractmethod
    def is_dirty(self) -> bool:
        """Whether the remote lacks something of this."""

    @property
    def size(self) -> int:
        return self.file.size

    @property
    def version(self) -> bytes:
        return self.file.version

    # --- blocks ---------------------------------------------------------------------------------

    def _is_needed(self, block: int) -> bool:
        return block * BLOCK_BYTES < self.base_size and not self.file.blocks.is_present(block)

    def _blocks(self, offset: int, end: int) -> range:
        return range(offset // BLOCK_BYTES, -(-end // BLOCK_BYTES))

    async def _fetch(self, offset: int, length: int, *, urgent: bool) -> m.Fetched:
        attempts = unchanged = 0
        while True:
            while self.state.motion is not None:
                await self.state.motion.wait()
            if self._store.memory.slow_disk.is_slow:
                self._use_memory()
            version, path, cache_file = self.version, self.place.path, self.file.path
            length = max(0, min(length, self.base_size - offset))
            try:
                fetched = await self._fetch_once(offset, length, urgent=urgent)
                if self.version == version and self.file.path == cache_file:
                    self._came(fetched, offset)
                    return fetched
            except (Changed, NotFound):
                attempts += 1
                follows = self.state.motion is not None or await self._follows()
                moved = self.version != version or self.place.path != path
                unchanged += follows and not moved and self.state.motion is None
                if unchanged > 1 and self.base_size <= UNSIZED_BYTES:
                    self.is_unsized = True
                    raise
                if attempts > _GROWTH_ATTEMPTS or not (follows or moved):
                    raise
            except CacheFull:
                attempts += 1
                if self.file.path != cache_file:
                    continue
                has_room = attempts == 1 and await self._store.make_room(4 * length)
                if not has_room and not self._use_memory():
                    raise
            except CacheFileGone:
                if self.file.path == cache_file:
                    if not self.file.in_memory:
                        raise
                    self._store.memory.is_usable = False
                    self.use_disk()
            except RemoteError:
                if self.file.path == cache_file:
                    raise

    def _came(self, fetched: m.Fetched, offset: int) -> None:
        memory = self._store.memory
        if self.file.in_memory:
            memory.arrived(self.file, offset, fetched.length)
        elif memory.slow_disk.stored(fetched.length, fetched.fetch_seconds, fetched.store_seconds):
            log.info(
                "the disk with the cache is slower than %s: it is not used for now",
                self.namespace.name,
            )

    def _note_added(self, length: int) -> None:
        if not self.file.in_memory:
            self._store.note_added(length)

    def _use_memory(self) -> bool:
        """The disk is slow or full: whether the file goes on in memory. No await."""
        return not self.needs_disk and self._store.memory.to_memory(self.file)

    def use_disk(self) -> None:
        """From now on the cache file is on the disk. What was in memory is fetched anew: also by
        the fetches that are under way. No await."""
        self.needs_disk = True
        if not self.file.in_memory:
            return
        if self.state.is_gone:
            raise Stale("the file was removed or replaced since it was opened; open it again")
        try:
            self._store.memory.to_disk(self.file)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CacheFull("the local disk with the cache is full") from None
            raise

    async def _fetch_once(self, offset: int, length: int, *, urgent: bool = True) -> m.Fetched:
        request = m.Fetch(
            self.place.path,
            self.version,
            offset,
            length,
            self.file.path,
            self.handle,
            growing=self.growing,
            urgent=urgent,
        )
        asked, version = self._now(), self.version
        fetched = await self.namespace.fetch(request, FETCH_TIMEOUT)
        self.held = self.handle != NO_HANDLE
        if self.version == version:
            self._vouch(asked)
        return fetched

    def _vouch(self, asked: float) -> None:
        """The remote had this version when it was asked at `asked`: size and times are as they are
        shown. The rest (its mode, say) is asked for again after VOUCH_SECONDS all the same."""
        place = self.place
        if place.validated_at != self._vouched:
            self._looked = place.validated_at
        settled = not self.growing and not self.is_dirty() and place.entry.version == self.version
        if settled and asked - self._looked < VOUCH_SECONDS:
            place.validated_at = self._vouched = max(place.validated_at, asked)

    async def revalidate(self) -> Entry | None:
        """Ask the remote for the very file that is open here, whatever its name is now.

        A file that was appended to goes on with its longer version; only the same remote file
        counts (the remote's own handle tells) and only growth. After any other change what is not
        in the cache yet can't be read any more. None where the remote can't tell: it holds no file
        open, or has none of this version; and where the answer was overtaken by a change here.
        """
        if not self.capabilities.handles or self.state.is_unlinked:
            return None
        if not self.held and (found := await self.hold()) is not self.place.entry:
            return found
        wanted, version = m.StatOpen(self.handle), self.version
        entry: Entry | None = await self.namespace.call(wanted, Entry | None)  # type: ignore[arg-type]
        if entry is None:
            self.held = False
        elif self.state.is_unlinked or self.is_dirty() or self.version != version:
            return None  # what was asked is no longer what is here
        elif entry.version != version and entry.size > self.size:
            self._adopt(entry)
        return entry

    async def _follows(self) -> bool:
        """Whether to fetch again after the remote said that the version changed. Another file than
        the one that is held may be longer, and the kernel would cut it at the size it knows."""
        if self.is_dirty() or not self.held:
            return False
        entry = await self.revalidate()
        return entry is not None and entry.version == self.version

    @property
    def lacks_bytes(self) -> bool:
        """Whether something of the remote's content is not in the cache."""
        return any(map(self._is_needed, self._blocks(0, self.base_size)))

    def can_hold(self, *, read_only: bool) -> bool:
        """Whether the file can be kept readable from open(2) on, whatever has its name then. Who
        may write does not wait for bytes that it will perhaps replace."""
        if self.is_dirty() or self.state.is_gone or self.held or not self.lacks_bytes:
            return False
        return self.capabilities.handles or (read_only and self.base_size <= WHOLE_AT_OPEN_BYTES)

    async def hold(self) -> Entry | None:
        """Have the remote hold the file open, or where it can't, bring all of it here. The entry
        of what is held: `place.entry`, or another that took its place, as nothing of this version
        was served yet (a log that never rests needs this). None where nothing can be held."""
        version, entry = self.version, self.place.entry
        try:
            if self.capabilities.handles:
                await self._fetch_once(0, 0)
            else:
                await self.fetch_all()
        except NotFound:
            return None
        except Changed:
            return await self._adopt_unread(version) if self.capabilities.handles else None
        return entry if self.version == version else None

    async def follow_name(self) -> bool:
        """Whether it goes on as what has the name now, of which this was nothing but a look."""
        if self.held:
            self.held = False
            await self.let_go()
        version = self.version
        if self.capabilities.handles:
            return await self.hold() is not None
        try:
            entry = await self.namespace.stat(self.place.path)
        except NotFound:
            return False
        if self._is_taken(version) or not stat.S_ISREG(entry.mode):
            return False
        self._adopt(entry)
        return True

    def _is_taken(self, version: bytes) -> bool:
        """Whether what is here is more than a look at this version."""
        return self.served or self.is_dirty() or self.state.is_unlinked or self.version != version

    async def _adopt_unread(self, version: bytes) -> Entry | None:
        """What is there now may be open on the remote under our handle."""
        self.held = True
        wanted = m.StatOpen(self.handle)
        entry: Entry | None = await self.namespace.call(wanted, Entry | None)  # type: ignore[arg-type]
        if entry is None or self._is_taken(version) or not stat.S_ISREG(entry.mode):
            self.held = False
            await self.let_go()
            return None
        self._adopt(entry)
        return entry

    def _adopt(self, entry: Entry) -> None:
        """Go on with this version: what is cached of the other is dropped, not mixed."""
        path, old, new = self.place.path, self.size, entry.size
        log.debug("%r went from %d to %d bytes on the remote", path, old, new)
        self.file.evict(list(self.file.blocks.present()))
        self.file.version = entry.version
        self.file.size = self.base_size = new
        self.growing = new > old

    async def read_unsized(self, offset: int, length: int) -> bytes:
        """What the remote gives there now, which is not cached."""
        place, namespace = self.place, self.namespace
        if self.is_dirty() or self.state.is_gone:
            return b""
        version = self.version
        request = m.ReadUnsized(place.path, offset, min(length, UNSIZED_BYTES), self.handle)
        try:
            data = await namespace.call(request, bytes)
        except NotConnected:
            if not namespace.sleeps:
                raise
            return b""
        except NotFound as error:
            raise Stale(error.message) from None
        self.held = True
        if data:
            await self._look_again()
        elif not offset and self.version == version:
            namespace.note_empty(self)
        return data

    async def _look_again(self) -> None:
        """A file that was empty had bytes: has it grown? Who reads on must see a size that fits
        them: tail(1) takes a smaller one for a file that was cut, and shows all again."""
        await self.revalidate()
        self.place.validated_at = -math.inf

    async def let_go(self) -> None:
        """The remote need not keep the file open any more."""
        try:
            await self.namespace.do(m.Release(self.handle))
        except RemoteError as error:
            log.debug("releasing %r: %s", self.place.path, error.message)

    async def fetch_ahead(self, most: int) -> bool:
        """Bring the first `most` bytes into the cache; whether the remote had this version. The
        remote holds nothing open for it afterwards."""
        self.handle = NO_HANDLE
        blocks = self._blocks(0, min(most, self.base_size))
        version, asked = self.version, self._now()
        try:
            if any(self._is_needed(block) for block in blocks):
                started = self._fetcher.start(blocks, most, urgent=False)
                await self._fetcher.wait(started)
            elif (await self.namespace.stat(self.place.path)).version == version:
                self._vouch(asked)
            else:
                return False
        except (Changed, NotFound):
            return False
        return self.version == version and not self.is_dirty()

    async def fetch_all(self, limit: int | None = None) -> None:
        """Bring what is missing into the cache, or nothing if that is more than `limit` bytes."""
        blocks = self._blocks(0, self.base_size)
        if limit is not None:
            missing = sum(1 for block in blocks if self._is_needed(block))
            if missing * BLOCK_BYTES > limit:
                return
        step = FETCH_ALL_BYTES // BLOCK_BYTES  # all at once would not fit into memory
        for first in range(0, len(blocks), step):
            await self._ensure_fetched(blocks[first : first + step])

    @property
    def window(self) -> int:
        """Bytes that one reader may be ahead: what the link and the memory for it allow."""
        return min(self.namespace.bandwidth.window, self._budget.share, self._store.max_bytes // 4)

    def prefetch(self, start: int, end: int) -> None:
        """Begin to fetch what is missing of [start, end), and to read the rest from the disk."""
        end = min(end, self.size)
        if self._disk_waits and start < end:
            self._nursery.start_soon(self._read_from_disk, start, end)
        if self.file.in_memory or self._store.may_prefetch():
            blocks = self._blocks(start, min(end, self.base_size))
            self._fetcher.start(blocks, self.namespace.bandwidth.fetch_bytes, urgent=False)

    async def _read_from_disk(self, start: int, end: int) -> None:
        """Into the page cache, so that reads need not wait one by one."""
        advice = os.POSIX_FADV_WILLNEED
        try:
            await trio.to_thread.run_sync(
                os.posix_fadvise, self.file.fd, start, end - start, advice
            )
        except OSError as error:  # closed meanwhile, or a file system without advice
            log.debug("the cache file of %r takes no advice: %s", self.place.path, error)

    def cancel_prefetch(self, start: int, end: int) -> None:
        """What is under way for [start, end) alone, and nobody waits for, ends."""
        self._fetcher.cancel(self._blocks(start, end))

    def stop_prefetch(self) -> None:
        self._fetcher.cancel_all()

    def demand(self, offset: int, length: int) -> None:
        """Begin to fetch what a read is about to wait for."""
        blocks = self._blocks(offset, min(offset + length, self.base_size))
        if not self.file.blocks.are_trusted(blocks):
            self._fetcher.start(blocks, self.namespace.bandwidth.fetch_bytes, urgent=True)

    async def settle(self) -> None:
        """Return once no fetch is under way; what only runs ahead is cancelled."""
        await self._fetcher.settle()

    def is_idle(self) -> bool:
        return self._fetcher.is_idle(None)

    # --- reading --------------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> bytes | bytearray:
        """Up to `length` bytes; fewer only at the end of the file."""
        self.file.reading_at = offset  # what is waited for is the last to be evicted
        while True:
            end = min(offset + length, self.size)
            if offset >= end:
                return b""
            blocks = self._blocks(offset, end)
            if not self.file.blocks.are_trusted(blocks):
                await self._ensure(blocks)
                if end > self.size:
                    continue  # it was cut meanwhile
                if untrusted := [block for block in blocks if self._is_untrusted(block)]:
                    await self._verify(untrusted)
                    continue
            data = self.file.read_now(offset, end - offset)
            self._disk_waits = data is None
            if data is None:
                evictions = self.file.evictions
                data = await trio.to_thread.run_sync(self.file.read, offset, end - offset)
                if self.file.evictions != evictions:
                    continue  # what was read may be a hole
            self.served = True
            return data

    async def _ensure(self, blocks: range) -> None:
        try:
            await self._ensure_fetched(blocks)
        except (Changed, NotFound) as error:
            raise Stale(error.message) from None

    async def _ensure_fetched(self, blocks: range) -> None:
        await self._fetcher.ensure(blocks, self.namespace.bandwidth.fetch_bytes)

    def _is_untrusted(self, block: int) -> bool:
        blocks = self.file.blocks
        return blocks.is_present(block) and not blocks.is_trusted(block)

    async def _verify(self, blocks: list[int]) -> None:
        """Compare checksums of what an earlier mount left; a block that fails is fetched anew.

        For a reader who goes on, what follows is compared as well: a thread for each block costs
        more than the reading."""
        goes_on = blocks[0] == self._verified_to
        self._verify_ahead = min(_MOST_VERIFIED, 2 * self._verify_ahead + 1) if goes_on else 0
        following = range(blocks[-1] + 1, blocks[-1] + 1 + self._verify_ahead)
        wanted = [*blocks, *takewhile(self._is_untrusted, following)]
        self._verified_to = wanted[-1] + 1
        damaged: list[int] = []
        for first in range(0, len(wanted), _MOST_VERIFIED):
            some = wanted[first : first + _MOST_VERIFIED]
            sums = await trio.to_thread.run_sync(self.file.compute_checksums, some)
            for block, found in zip(some, sums, strict=True):
                if not self._is_untrusted(block):
                    continue
                if found == self.file.blocks.checksum(block):
                    self.file.blocks.trust(block)
                else:
                    damaged.append(block)
        if damaged:
            log.warning("%d blocks of %r were damaged in the cache", len(damaged), self.place.path)
            self.file.evict(damaged)
