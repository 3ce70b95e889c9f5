"""Keeps the cache within `cache_size`, and so much of its disk free as was asked for.

Idle files go first, least recently used first: a small one whole, of a large one as many blocks as
are needed, from its end. Then clean blocks of open files: those far from where the file is being
read, then the others. Dirty blocks (invariant 3) and pinned files never go.

The bytes go before the index hears of it. Killed in between, the index names blocks that are holes
by then: their checksums don't match, unless the block is zeros, and then a hole is what it should
be. Nothing here looks at all files: not for a check, and not to evict a few.
"""

from __future__ import annotations

import logging
import math
import os
import sqlite3
import time
from collections.abc import Iterator

import trio
import trio.lowlevel

from hpcfs.cache.blocks import CHUNK_BLOCKS, pack_sums, unpack_sums
from hpcfs.cache.file import CacheFile
from hpcfs.cache.index import Record
from hpcfs.cache.registry import Registry
from hpcfs.model.entries import BLOCK_BYTES
from hpcfs.system import disk
from hpcfs.system.disk import MinFree

log = logging.getLogger(__name__)

MIB = 1024 * 1024
_SLACK_BYTES = 256 * MIB
_SLACK_PART = 20
"""Eviction makes this much more room than it must (a twentieth of the cache, but no more than
that), so that it doesn't run for every block."""
_RETRY_SECONDS = 0.5
_STEP_SECONDS = 0.05
_CHECK_BYTES = 4 * MIB
_VICTIMS_AT_ONCE = 200
_CHUNKS_AT_ONCE = 16
_CLOSE_BYTES = 2 * MIB
_AHEAD_BYTES = 64 * MIB
"""Around a reader: what it has just read and what was fetched for it goes last."""
KEEP_FORGOTTEN_BYTES = 64 * MIB
"""Of a file that lost its name while it is open, so much can perhaps not be fetched again."""


class Eviction:
    def __init__(self, registry: Registry, max_bytes: int, min_free: MinFree) -> None:
        self._registry = registry
        self.max_bytes = max_bytes
        self._min_free = min_free
        self._estimate = registry.used_bytes
        """Brought down to what is true when it matters. Too small only by what files grew that were
        truncated to more within their last block, until the next save."""
        self._unchecked = 0
        self._wanted = trio.Event()
        self._is_short = False
        self._retry = -math.inf
        """When to try again (trio's clock) after nothing could go."""

    # --- the bound ------------------------------------------------------------------------------

    def note_added(self, length: int) -> None:
        """`length` bytes were fetched or written; eviction starts when that may be too much."""
        self._estimate += length + 2 * BLOCK_BYTES  # a byte in a new block counts as the block
        self._unchecked += max(length, BLOCK_BYTES)  # so does a large file's short last block
        if self._unchecked > min(_CHECK_BYTES, self.max_bytes // _SLACK_PART):
            self.check()

    def may_prefetch(self) -> bool:
        """False while there is no room but for what somebody waits for. Costs nothing."""
        return not self._is_short

    def check(self) -> None:
        """Start to evict if there is too much, perhaps only now clean; or too little free."""
        self._unchecked = 0
        if self._excess() > 0:
            self._wanted.set()
        else:
            self._is_short = False

    def recount(self) -> None:
        """Check what is true: for who looks at every open file anyway."""
        self._estimate = self._registry.used_bytes
        self.check()

    def _excess(self) -> int:
        if self._estimate > self.max_bytes:
            self._estimate = self._registry.used_bytes
        return max(self._estimate - self.max_bytes, self._missing())

    def _missing(self) -> int:
        """How much less is free on the disk than should be."""
        try:
            found = disk.space(self._registry.directory)
        except OSError as error:
            log.warning("the disk with the cache can't be asked for its room: %s", error)
            return 0
        return self._min_free.of(found.total) - found.free

    async def run(self) -> None:
        """Also on a disk that fails: then the next bytes that come are the next attempt."""
        while True:
            await self._wanted.wait()
            await trio.sleep_until(self._retry)
            self._wanted = trio.Event()
            try:
                await self._make_enough_room()
            except (OSError, sqlite3.Error) as error:
                log.error("the cache can't be kept small: %s", error)  # noqa: TRY400

    async def _make_enough_room(self) -> None:
        self._estimate = self._registry.used_bytes
        excess = self._excess()
        if excess > 0:
            slack = min(_SLACK_BYTES, self.max_bytes // _SLACK_PART)
            if not await self.make_room(excess + slack):
                self._retry = trio.current_time() + _RETRY_SECONDS
            self._estimate = self._registry.used_bytes
            excess = self._excess()
        if excess > 0 and not self._is_short:
            log.info("the cache can't get smaller: the rest is pinned, not uploaded, or in use")
        self._is_short = excess > 0

    async def make_room(self, wanted: int) -> int:
        """Evict at least `wanted` bytes if that can be done; returns the bytes evicted."""
        freed = await self._registry.delete_forgotten()
        if freed < wanted:
            freed += await self._evict_idle(wanted - freed)
        if freed < wanted:
            freed += await self._evict_open(wanted - freed)
        return freed

    # --- idle files -----------------------------------------------------------------------------

    async def _evict_idle(self, wanted: int) -> int:
        registry = self._registry
        freed, after = 0, (-1.0, 0)
        while freed < wanted:
            async with registry.lookup:
                oldest = await registry.in_thread(registry.index.oldest, after, _VICTIMS_AT_ONCE)
                if not oldest:
                    break
                victims = [record for record in oldest if registry.is_idle(record.name)]
                for record in victims:
                    registry.record_cache.invalidate(record.origin, record.key)
                # Not to be believed if the index fails to hear what went.
                known = {one.name: registry.verified_blocks.forget(one.name) for one in victims}
                last, some = await registry.change(self._evict_records, victims, wanted - freed)
                for name, verified in known.items():
                    registry.verified_blocks.put_back(name, verified)
                last = last or oldest[-1]
                after = (last.last_used, last.row)
                freed += some
        return freed

    def _evict_records(self, records: list[Record], wanted: int) -> tuple[Record | None, int]:
        """In a thread, and not for long, as who opens a file waits. Returns the last one that was
        looked at, None if there was none, and the bytes that went. Files first: a full disk takes
        no change of the index."""
        freed, last = 0, None
        whole = []
        deadline = time.monotonic() + _STEP_SECONDS
        for record in records:
            if freed >= wanted or time.monotonic() > deadline:
                break
            last = record
            if record.cached_bytes - BLOCK_BYTES <= wanted - freed or not self._can_cut(record):
                self._registry.unlink(record.name)
                whole.append(record.name)
                freed += record.cached_bytes
            else:
                freed += self._cut(record, wanted - freed)
        try:
            self._registry.index.delete(whole)
        except sqlite3.Error as error:
            log.warning("the cache's index still names evicted files: %s", error)
        return last, freed

    def _can_cut(self, record: Record) -> bool:
        """Not what is gone, nor what is also a file of kept/ that a kill left with two names."""
        try:
            return os.stat(self._registry.path(record.name)).st_nlink == 1
        except FileNotFoundError:
            return False

    def _cut(self, record: Record, wanted: int) -> int:
        """The file's last blocks go. What is cut off its local end reads as zeros, like a hole."""
        index = self._registry.index
        left = -(-wanted // BLOCK_BYTES)
        blocks, cached = record.blocks, record.cached_bytes
        while left > 0:
            chunks, end = {}, None
            for number, packed in index.last_chunks(record.row, _CHUNKS_AT_ONCE):
                sums = unpack_sums(packed)
                present = [at for at, checksum in enumerate(sums) if checksum]
                gone = present[-left:]
                for at in gone:
                    sums[at] = 0
                chunks[number] = pack_sums(sums)
                left, blocks = left - len(gone), blocks - len(gone)
                end = number * CHUNK_BLOCKS + gone[0] if gone else end
                if left <= 0:
                    break
            if end is None:
                break
            os.truncate(self._registry.path(record.name), end * BLOCK_BYTES)
            cached = min(max(0, blocks) * BLOCK_BYTES, record.size)
            index.change_blocks(record.row, chunks, blocks, cached)
        return record.cached_bytes - cached

    # --- open files -----------------------------------------------------------------------------

    async def _evict_open(self, wanted: int) -> int:
        freed = 0
        for choose in (self._far, self._near, self._all):
            for file in sorted(self._registry.files.values(), key=lambda file: file.last_used):
                if freed < wanted:
                    freed += await _evict_runs(file, choose(file), wanted - freed)
        return freed

    def _far(self, file: CacheFile) -> Iterator[range]:
        """Blocks behind the reader, then those far ahead of it; all where nobody reads."""
        first, _, _, last = self._around(file)
        if file.users > 0:
            yield from file.blocks.runs(0, first)
            yield from file.blocks.runs(last, downward=True)
        else:
            yield from file.blocks.runs(downward=True)

    def _near(self, file: CacheFile) -> Iterator[range]:
        """Blocks around the reader, but not where it is."""
        first, at, soon, last = self._around(file)
        yield from file.blocks.runs(first, at)
        yield from file.blocks.runs(soon, last, downward=True)

    def _all(self, file: CacheFile) -> Iterator[range]:
        return file.blocks.runs(downward=True)

    def _around(self, file: CacheFile) -> tuple[int, int, int, int]:
        """Blocks: a little before where the file is read, there, a little and far after it."""
        at = file.reading_at // BLOCK_BYTES
        little = min(_CLOSE_BYTES, self.max_bytes // 8) // BLOCK_BYTES
        far = min(_AHEAD_BYTES, self.max_bytes // 2) // BLOCK_BYTES
        return max(0, at - little), at, at + little, at + far


async def _evict_runs(file: CacheFile, runs: Iterator[range], wanted: int) -> int:
    freed = 0
    for run in runs:
        most = min(wanted - freed, _evictable(file))
        if most <= 0:
            break
        blocks = clean_blocks(file, run)[: -(-most // BLOCK_BYTES)]
        if blocks:
            file.evict(blocks)
            freed += len(blocks) * BLOCK_BYTES
        await trio.lowlevel.checkpoint()
    return freed


def _evictable(file: CacheFile) -> int:
    """How many bytes of it may go, as far as they are clean. A file that was forgotten and has no
    user goes whole, or is just moved to kept/."""
    if (
        file.in_memory
        or file.pins
        or file.pinned
        or file.fd < 0
        or not (file.indexed or file.users)
    ):
        return 0
    return file.cached_bytes - file.dirty.total - (0 if file.indexed else KEEP_FORGOTTEN_BYTES)


def clean_blocks(file: CacheFile, run: range) -> list[int]:
    """The blocks that are still present, and not dirty."""
    blocks = [block for block in run if file.blocks.is_present(block)]
    if not file.dirty.overlaps(run.start * BLOCK_BYTES, run.stop * BLOCK_BYTES):
        return blocks
    return [b for b in blocks if not file.dirty.overlaps(b * BLOCK_BYTES, (b + 1) * BLOCK_BYTES)]
