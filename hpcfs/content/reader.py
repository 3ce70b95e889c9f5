"""Reads of one open file: from the cache file, once what is missing was fetched into it.

A range is brought by content/fetcher.py, by way of `Reader.fetch`, which asks content/base.py's
version for it. While an upload or a rename runs (State.motion), the version or the name changes:
fetches wait for its end. No section between two awaits needs a lock.
"""

from __future__ import annotations

import errno
import logging
import os
from itertools import takewhile

import trio

from hpcfs.cache.file import CacheFile
from hpcfs.content.base import UNSIZED_BYTES, BaseVersion
from hpcfs.content.fetcher import Fetcher
from hpcfs.content.shared import RemoteFile, Shared
from hpcfs.content.state import State
from hpcfs.model.entries import BLOCK_BYTES, NO_HANDLE, Entry
from hpcfs.model.errors import (
    CacheFileGone,
    CacheFull,
    Changed,
    NotFound,
    RemoteError,
    Stale,
)
from hpcfs.protocol import messages as m

log = logging.getLogger(__name__)

WHOLE_AT_OPEN_BYTES = 1024 * 1024
"""A file of this size at most comes with its open(2) where the remote can't hold it open: who
replaces it then does not cut it short for who reads it."""
FETCH_ALL_BYTES = 32 * 1024 * 1024
"""Fetched at once of a file that is needed whole: more would not fit into memory."""
_MOST_VERIFIED = 128
"""Blocks that one thread verifies at once."""
_GROWTH_ATTEMPTS = 4
"""A file that is appended to all the time may grow between finding its size and reading."""


class Reader:
    """Sizes and offsets in bytes. Raises RemoteError and FilesystemError."""

    def __init__(self, remote: RemoteFile, file: CacheFile, state: State, shared: Shared) -> None:
        self._remote = remote
        self._file = file
        self._state = state
        self._store = shared.store
        self._nursery = shared.nursery
        self._budget = shared.budget
        self.base = BaseVersion(remote, file, state, shared.now)
        self.fetcher = Fetcher(file, self, shared.nursery, shared.budget)
        self.is_unsized = False
        """The remote's file ends before the size that it tells, and did not change: as in /sys."""
        self._needs_disk = False
        """The cache file may not be in memory: it was or will be written to, or shall stay."""
        self._disk_waits = False
        """The last read was not in the page cache: then more of it won't be either."""
        self._verified_to = 0
        self._verify_ahead = 0
        """Blocks to verify beyond those that a read needs."""

    # --- reading ----------------------------------------------------------------------------------

    def has(self, offset: int, length: int) -> bool:
        """Whether these bytes, at least one, are in the cache file and known to be right."""
        end = min(offset + length, self._file.size)
        return offset < end and self._file.blocks.are_trusted(blocks_of(offset, end))

    async def read(self, offset: int, length: int) -> bytes | bytearray:
        """Up to `length` bytes; fewer only at the end of the file."""
        file = self._file
        file.reading_at = offset  # what is waited for is the last to be evicted
        while True:
            end = min(offset + length, file.size)
            if offset >= end:
                return b""
            blocks = blocks_of(offset, end)
            if not file.blocks.are_trusted(blocks):
                await self._ensure(blocks)
                if end > file.size:
                    continue  # it was cut meanwhile
                if untrusted := [block for block in blocks if self._is_untrusted(block)]:
                    await self._verify(untrusted)
                    continue
            data = file.read_now(offset, end - offset)
            self._disk_waits = data is None
            if data is None:
                evictions = file.evictions
                data = await trio.to_thread.run_sync(file.read, offset, end - offset)
                if file.evictions != evictions:
                    continue  # what was read may be a hole
            self.base.served = True
            return data

    async def read_unsized(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes as the remote has them now (BaseVersion.read_unsized)."""
        return await self.base.read_unsized(offset, length)

    async def prepare_write(self, offset: int, end: int) -> None:
        """Make it safe to write [offset, end): what remains of partly covered blocks is here, and
        no fetch under way will overwrite the new bytes. Nothing is awaited after the last check."""
        covered = blocks_of(offset, end)
        ends = {covered[0], covered[-1]}
        while True:
            if missing := [block for block in ends if self._is_edge(block, offset, end)]:
                for block in missing:
                    await self._ensure(range(block, block + 1))
            elif untrusted := [block for block in ends if self._is_untrusted(block)]:
                await self._verify(untrusted)
            elif self.fetcher.flights and not self.fetcher.is_idle(covered):
                await self.fetcher.wait_idle(covered)
            else:
                return

    def _is_edge(self, block: int, offset: int, end: int) -> bool:
        """Whether bytes of the remote's in this block stay beside the new ones, and are missing."""
        start = block * BLOCK_BYTES
        stop = min(start + BLOCK_BYTES, self.base.size)
        if start >= stop or self._file.blocks.is_present(block):
            return False
        return start < offset or end < stop

    # --- blocks -----------------------------------------------------------------------------------

    @property
    def limit(self) -> int:
        """Where the bytes end that come from the remote."""
        return self.base.size

    @property
    def lacks_bytes(self) -> bool:
        """Whether something of the remote's content is not in the cache."""
        return any(map(self.fetcher.is_needed, blocks_of(0, self.base.size)))

    async def _ensure(self, blocks: range) -> None:
        try:
            await self._ensure_fetched(blocks)
        except (Changed, NotFound) as error:
            raise Stale(error.message) from None

    async def _ensure_fetched(self, blocks: range) -> None:
        await self.fetcher.ensure(blocks, self._remote.namespace.bandwidth.fetch_bytes)

    def _is_untrusted(self, block: int) -> bool:
        blocks = self._file.blocks
        return blocks.is_present(block) and not blocks.is_trusted(block)

    async def verify_all(self) -> bool:
        """Verify what counts of the remote's content; whether nothing had to be."""
        untrusted = [block for block in blocks_of(0, self.base.size) if self._is_untrusted(block)]
        if untrusted:
            await self._verify(untrusted)
        return not untrusted

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
            sums = await trio.to_thread.run_sync(self._file.compute_checksums, some)
            for block, found in zip(some, sums, strict=True):
                if not self._is_untrusted(block):
                    continue
                if found == self._file.blocks.checksum(block):
                    self._file.blocks.trust(block)
                else:
                    damaged.append(block)
        if damaged:
            log.warning(
                "%d blocks of %r were damaged in the cache", len(damaged), self._remote.place.path
            )
            self._file.evict(damaged)

    # --- fetching ---------------------------------------------------------------------------------

    async def fetch(self, offset: int, length: int, *, urgent: bool) -> m.Fetched:
        """Bring a range into the cache file, whatever happens to the file meanwhile: the fetcher
        calls this. Raises RemoteError."""
        attempts = unchanged = 0
        state, file = self._state, self._file
        while True:
            while state.motion is not None:
                await state.motion.wait()
            if self._store.memory.slow_disk.is_slow:
                self._use_memory()
            version, path, cache_file = self.base.version, self._remote.place.path, file.path
            replacements = file.replacements
            length = max(0, min(length, self.base.size - offset))
            try:
                fetched = await self.base.fetch(offset, length, urgent=urgent)
                is_stored = file.path == cache_file and file.replacements == replacements
                if is_stored and self.base.version == version:
                    if file.in_memory:  # older blocks make room before these are present
                        self._store.memory.arrived(file, offset, fetched.length)
                    return fetched
            except (Changed, NotFound):
                attempts += 1
                follows = state.motion is not None or await self.base.follows()
                moved = self.base.version != version or self._remote.place.path != path
                unchanged += follows and not moved and state.motion is None
                if unchanged > 1 and self.base.size <= UNSIZED_BYTES:
                    self.is_unsized = True
                    raise
                if attempts > _GROWTH_ATTEMPTS or not (follows or moved):
                    raise
            except CacheFull:
                attempts += 1
                if file.path != cache_file:
                    continue
                has_room = attempts == 1 and await self._store.make_room(4 * length)
                if not has_room and not self._use_memory():
                    raise
            except CacheFileGone:
                if file.path == cache_file and file.in_memory:
                    self._store.memory.is_usable = False
                    self.use_disk()
                elif file.path == cache_file and not self._use_memory():
                    file.doubt_name()
                    raise
            except RemoteError:
                if file.path == cache_file:
                    raise

    def note_fetched(self, fetched: m.Fetched) -> None:
        """Count what is present now against the cache's size, and measure the disk."""
        memory = self._store.memory
        if self._file.in_memory:
            return
        self._store.note_added(fetched.length)
        if memory.slow_disk.stored(fetched.length, fetched.fetch_seconds, fetched.store_seconds):
            log.info(
                "the disk with the cache is slower than %s: it is not used for now",
                self._remote.namespace.name,
            )

    def _use_memory(self) -> bool:
        """The disk is slow or full: whether the file goes on in memory. No await."""
        return not self._needs_disk and self._store.memory.to_memory(self._file)

    def use_disk(self) -> None:
        """From now on the cache file is on the disk. What was in memory is fetched anew: also by
        the fetches that are under way. No await. Raises CacheFull, and Stale where the remote may
        not have the version any more."""
        self._needs_disk = True
        if not self._file.in_memory:
            return
        if self._state.is_gone:
            raise Stale("the file was removed or replaced since it was opened; open it again")
        try:
            self._store.memory.to_disk(self._file)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CacheFull("the local disk with the cache is full") from None
            raise

    async def fetch_first(self, most: int) -> bool:
        """Bring the first `most` bytes into the cache, for a program that will open the file;
        whether the remote had this version. It holds nothing open for it afterwards."""
        self.base.handle = NO_HANDLE
        blocks = blocks_of(0, min(most, self.base.size))
        version = self.base.version
        try:
            if any(self.fetcher.is_needed(block) for block in blocks):
                started = self.fetcher.start(blocks, most, urgent=False)
                await self.fetcher.wait(started)
            elif not await self.base.is_current():
                return False
        except (Changed, NotFound):
            return False
        return self.base.version == version and not self._state.is_dirty

    async def fetch_all(self, limit: int | None = None) -> None:
        """Bring what is missing into the cache, or nothing if that is more than `limit` bytes."""
        blocks = blocks_of(0, self.base.size)
        if limit is not None:
            missing = sum(1 for block in blocks if self.fetcher.is_needed(block))
            if missing * BLOCK_BYTES > limit:
                return
        step = FETCH_ALL_BYTES // BLOCK_BYTES
        for first in range(0, len(blocks), step):
            await self._ensure_fetched(blocks[first : first + step])

    # --- holding open -----------------------------------------------------------------------------

    def can_hold(self, *, read_only: bool) -> bool:
        """Whether the file can be kept readable from open(2) on, whatever has its name then. Who
        may write does not wait for bytes that it will perhaps replace."""
        state = self._state
        if state.is_dirty or state.is_gone or self.base.held or not self.lacks_bytes:
            return False
        if self._remote.capabilities.handles:
            return True
        return read_only and self.base.size <= WHOLE_AT_OPEN_BYTES

    async def hold(self) -> Entry | None:
        """Have the remote hold the file open (BaseVersion.hold_open), or where it can't, bring all
        of it here. None where nothing can be held."""
        if self._remote.capabilities.handles:
            return await self.base.hold_open()
        version, entry = self.base.version, self._remote.place.entry
        try:
            await self.fetch_all()
        except (NotFound, Changed):
            return None
        return entry if self.base.version == version else None

    # --- ahead of programs ------------------------------------------------------------------------

    @property
    def window(self) -> int:
        """Bytes that one reader may be ahead: what the link and the memory for it allow."""
        return min(
            self._remote.namespace.bandwidth.window,
            self._budget.share,
            self._store.max_bytes // 4,
        )

    def prefetch(self, start: int, end: int) -> None:
        """Begin to fetch what is missing of [start, end), and to read the rest from the disk."""
        end = min(end, self._file.size)
        if self._disk_waits and start < end:
            self._nursery.start_soon(self._read_from_disk, start, end)
        if self._file.in_memory or self._store.may_prefetch():
            blocks = blocks_of(start, min(end, self.base.size))
            bandwidth = self._remote.namespace.bandwidth
            self.fetcher.start(blocks, bandwidth.fetch_bytes, urgent=False)

    async def _read_from_disk(self, start: int, end: int) -> None:
        """Into the page cache, so that reads need not wait one by one."""
        advice = os.POSIX_FADV_WILLNEED
        try:
            await trio.to_thread.run_sync(
                os.posix_fadvise, self._file.fd, start, end - start, advice
            )
        except OSError as error:  # closed meanwhile, or a file system without advice
            log.debug("the cache file of %r takes no advice: %s", self._remote.place.path, error)

    def cancel_prefetch(self, start: int, end: int) -> None:
        """What is under way for [start, end) alone, and nobody waits for, ends."""
        self.fetcher.cancel(blocks_of(start, end))

    def demand(self, offset: int, length: int) -> None:
        """Begin to fetch what a read is about to wait for."""
        blocks = blocks_of(offset, min(offset + length, self.base.size))
        if not self._file.blocks.are_trusted(blocks):
            bandwidth = self._remote.namespace.bandwidth
            self.fetcher.start(blocks, bandwidth.fetch_bytes, urgent=True)


def blocks_of(offset: int, end: int) -> range:
    """The numbers of the blocks that have a byte of [offset, end)."""
    return range(offset // BLOCK_BYTES, -(-end // BLOCK_BYTES))
