"""Keeps the cache within `cache_size`, and the configured room on its disk free.

Idle files are evicted first, in order of last use: a small one whole, of a large one as many blocks
as needed, from its end. Then clean blocks of open files follow: first those far from the read
position, then the others. Dirty blocks (invariant 3) and pinned files are never evicted.

The bytes are deleted before the index is updated. If the process is killed in between, the index
names blocks that are holes: their checksums don't match, unless the block is all zeros, and then a
hole is the right content. Nothing here looks at all files: neither a check nor evicting a few.
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
"""Eviction frees this many bytes more than it must (a twentieth of the cache, at most
_SLACK_BYTES), so that it does not run for every block."""
_RETRY_SECONDS = 0.5
_STEP_SECONDS = 0.05
_CHECK_BYTES = 4 * MIB
_VICTIMS_AT_ONCE = 200
_CHUNKS_AT_ONCE = 16
_CLOSE_BYTES = 2 * MIB
_AHEAD_BYTES = 64 * MIB
"""The window after the read position: blocks just read and blocks prefetched are evicted last."""
KEEP_FORGOTTEN_BYTES = 64 * MIB
"""Bytes of an unlinked open file that are not evicted, since they can perhaps not be fetched
again."""


class Eviction:
    """Bounds the size of one cache, in bytes."""

    def __init__(self, registry: Registry, max_bytes: int, min_free: MinFree) -> None:
        self._registry = registry
        self.max_bytes = max_bytes
        self._min_free = min_free
        self._estimate = registry.used_bytes
        """An estimate of the used bytes, replaced by the exact number when it matters. It is too
        small only by the growth of files that were truncated to more within their last block, until
        the next save."""
        self._unchecked = 0
        self._wanted = trio.Event()
        self._is_short = False
        self._retry = -math.inf
        """The time (trio's clock) of the next attempt, after nothing could be evicted."""

    # --- the bound ------------------------------------------------------------------------------

    def note_added(self, length: int) -> None:
        """Note that `length` bytes were fetched or written; wakes `run` where that may be too
        much."""
        self._estimate += length + 2 * BLOCK_BYTES  # a byte in a new block counts as the block
        self._unchecked += max(length, BLOCK_BYTES)  # so does a large file's short last block
        if self._unchecked > min(_CHECK_BYTES, self.max_bytes // _SLACK_PART):
            self.check()

    def may_prefetch(self) -> bool:
        """Return False while there is room only for blocks that somebody waits for. Costs
        nothing."""
        return not self._is_short

    def note_cleaned(self) -> None:
        """Something is evictable that was not: try again where that was what lacked."""
        if self._is_short or self._estimate > self.max_bytes:
            self.check()

    def check(self) -> None:
        """Wake `run` if the cache is too large, perhaps with blocks that became clean only now, or
        the disk too full."""
        self._unchecked = 0
        if self._excess() > 0:
            self._wanted.set()
        else:
            self._is_short = False

    def recount(self) -> None:
        """Recompute the usage from the open files (slow path), then check."""
        self._estimate = self._registry.used_bytes
        self.check()

    def _excess(self) -> int:
        if self._estimate > self.max_bytes:
            self._estimate = self._registry.used_bytes
        return max(self._estimate - self.max_bytes, self._missing())

    def _missing(self) -> int:
        """Return how many bytes are missing to the room that must stay free."""
        try:
            found = disk.space(self._registry.directory)
        except OSError as error:
            log.warning("the disk with the cache can't be asked for its room: %s", error)
            return 0
        return self._min_free.of(found.total) - found.free

    async def run(self) -> None:
        """Evict whenever it is needed, forever. After a failure of the disk the next bytes added
        trigger the next attempt."""
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
        """Evict at least `wanted` bytes if possible; return the bytes evicted."""
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
                # Forgotten at once: the index may fail to record the eviction.
                known = {one.name: registry.verified_blocks.forget(one.name) for one in victims}
                last, some, deleted = await registry.change(
                    self._evict_records, victims, wanted - freed
                )
                for name in known.keys() - deleted:
                    registry.verified_blocks.put_back(name, known[name])
                last = last or oldest[-1]
                after = (last.last_used, last.row)
                freed += some
        return freed

    def _evict_records(
        self, records: list[Record], wanted: int
    ) -> tuple[Record | None, int, set[str]]:
        """Evict idle files, in a thread; not for long, since opening a file waits for it.

        Returns the last record looked at (None if there was none), the bytes evicted and the names
        of the files that are gone whole. Files are deleted before their records: a full disk takes
        no change of the index.
        """
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
        return last, freed, set(whole)

    def _can_cut(self, record: Record) -> bool:
        """Return whether the file exists, and is not also a file of kept/ that a kill left with two
        names."""
        try:
            return os.stat(self._registry.path(record.name)).st_nlink == 1
        except FileNotFoundError:
            return False

    def _cut(self, record: Record, wanted: int) -> int:
        """Evict the file's last blocks. The part cut off the local file reads as zeros, like a
        hole."""
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
        """Yield the blocks behind the reader, then those far ahead of it; all blocks where nobody
        reads."""
        first, _, _, last = self._around(file)
        if file.users > 0:
            yield from file.blocks.runs(0, first)
            yield from file.blocks.runs(last, downward=True)
        else:
            yield from file.blocks.runs(downward=True)

    def _near(self, file: CacheFile) -> Iterator[range]:
        """Yield the blocks around the reader, but not those at its position."""
        first, at, soon, last = self._around(file)
        yield from file.blocks.runs(first, at)
        yield from file.blocks.runs(soon, last, downward=True)

    def _all(self, file: CacheFile) -> Iterator[range]:
        return file.blocks.runs(downward=True)

    def _around(self, file: CacheFile) -> tuple[int, int, int, int]:
        """Return four block numbers: a little before the read position, the position itself, a
        little and far after it."""
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
    """Return how many bytes of it may be evicted, as far as they are clean. A forgotten file
    without users is deleted whole, or moved to kept/."""
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
    """Return the blocks of the run that are still present, and not dirty."""
    blocks = [block for block in run if file.blocks.is_present(block)]
    if not file.dirty.overlaps(run.start * BLOCK_BYTES, run.stop * BLOCK_BYTES):
        return blocks
    return [b for b in blocks if not file.dirty.overlaps(b * BLOCK_BYTES, (b + 1) * BLOCK_BYTES)]
