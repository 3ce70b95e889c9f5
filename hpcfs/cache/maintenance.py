"""The user's operations on a cache: totals, clear, verify, pin.

They work on an open Store, mounted or not. They read the index in pages, and let everything else
continue meanwhile. Dirty data and the files in kept/ are not touched (invariant 3).
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

import trio

from hpcfs.cache.blocks import CHUNK_BLOCKS, pack_sums, unpack_sums
from hpcfs.cache.eviction import clean_blocks
from hpcfs.cache.file import CacheFile, checksum
from hpcfs.cache.index import OriginTotals, Record
from hpcfs.cache.store import Store
from hpcfs.model import paths
from hpcfs.model.entries import BLOCK_BYTES

log = logging.getLogger(__name__)

_PAGE = 200
_READ_BLOCKS = 64
"""Blocks that are read at once: 4 MiB."""

ReportBytes = Callable[[int, int], Awaitable[None]]
"""Called with (bytes done, bytes in total)."""


@dataclass(frozen=True, slots=True)
class CachedPath:
    """A file or directory of a remote folder; `key` is b"" for its root."""

    origin: str
    key: bytes


@dataclass
class Verification:
    """The result of `verify`."""

    files: int = 0
    bytes: int = 0
    damaged_files: int = 0
    damaged_bytes: int = 0


async def totals(store: Store) -> list[OriginTotals]:
    """Return the totals of each remote folder, as far as the index was told."""
    found = await store.in_thread(store.registry.index.totals)
    return [one for one in found if one.files]


async def _pages(
    store: Store, places: list[CachedPath] | None
) -> AsyncGenerator[list[Record], None]:
    """Yield pages of all files in the index, or of those at and below the places."""
    index = store.registry.index
    if places is None:
        after = 0
        while page := await store.in_thread(index.page, after, _PAGE):
            yield page
            after = page[-1].row
        return
    for place in places:
        last = b""
        while page := await store.in_thread(index.page_under, place.origin, place.key, last, _PAGE):
            yield page
            last = page[-1].key
            if not last:
                break


# --- clear --------------------------------------------------------------------------------------


async def clear(
    store: Store, places: list[CachedPath] | None, report: ReportBytes, *, pinned: bool = False
) -> tuple[int, int]:
    """Drop all clean data, and pinned files only if `pinned`; return (files, bytes) dropped."""
    await store.save()
    files = freed = 0
    total = store.used_bytes
    async with aclosing(_pages(store, places)) as pages:
        async for page in pages:
            gone = await _clear_page(store, page, pinned=pinned)
            files += len(gone)
            freed += sum(record.cached_bytes for record in gone)
            await report(freed, total)
    for file in list(store.registry.files.values()):
        if file.indexed and not file.pins and (pinned or not file.pinned) and _is_in(file, places):
            before = file.cached_bytes
            for run in file.blocks.runs():
                file.evict(clean_blocks(file, run))
                await trio.lowlevel.checkpoint()
            freed += before - file.cached_bytes
    return files, freed


async def _clear_page(store: Store, page: list[Record], *, pinned: bool) -> list[Record]:
    """Drop the idle files of a page; return their records."""
    async with store.registry.lookup:
        gone = [
            record
            for record in page
            if store.registry.is_idle(record.name) and (pinned or not record.pinned)
        ]
        for record in gone:
            store.registry.record_cache.invalidate(record.origin, record.key)
            store.registry.verified_blocks.forget(record.name)
        await store.registry.change(store.registry.index.delete, [record.name for record in gone])
    for record in gone:  # after a kill here they are strays, which the next mount removes
        await trio.to_thread.run_sync(store.registry.unlink, record.name)
    return gone


def _is_in(file: CacheFile, places: list[CachedPath] | None) -> bool:
    return places is None or any(
        file.origin == place.origin and paths.is_below(file.key, place.key) for place in places
    )


# --- verify -------------------------------------------------------------------------------------


async def verify(store: Store, report: ReportBytes) -> Verification:
    """Compare every block with its checksum. Damaged blocks are dropped, and fetched again when
    they are read."""
    await store.save()
    found = Verification()
    total = store.used_bytes
    async with aclosing(_pages(store, None)) as pages:
        async for page in pages:
            for record in page:
                await _verify_file(store, record, found, lambda: report(found.bytes, total))
    return found


async def _verify_file(
    store: Store, record: Record, found: Verification, step: Callable[[], Awaitable[None]]
) -> None:
    damaged = 0
    after = -1
    while chunk := await store.in_thread(store.registry.index.chunk_after, record.row, after):
        after, packed = chunk
        sums = unpack_sums(packed)
        present = [at for at, one in enumerate(sums) if one]
        for first in range(0, len(present), _READ_BLOCKS):
            some = {after * CHUNK_BLOCKS + at: sums[at] for at in present[first:][:_READ_BLOCKS]}
            path = store.registry.path(record.name)
            bad = await trio.to_thread.run_sync(_mismatches, path, record.size, some)
            found.bytes += sum(min(BLOCK_BYTES, record.size - b * BLOCK_BYTES) for b in some)
            if bad:
                damaged += await _drop(store, record, bad)
            await step()
    found.files += 1
    if damaged:
        log.warning("%d blocks of %r were damaged in the cache", damaged, record.key)
        found.damaged_files += 1
        found.damaged_bytes += damaged * BLOCK_BYTES


def _mismatches(path: str, size: int, sums: dict[int, int]) -> list[int]:
    """Return the damaged blocks, all of them where the file is gone. Runs in a thread."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return list(sums)
    try:
        return [block for block, one in sums.items() if _checksum(fd, block, size) != one]
    finally:
        os.close(fd)


def _checksum(fd: int, block: int, size: int) -> int:
    offset = block * BLOCK_BYTES
    length = max(0, min(BLOCK_BYTES, size - offset))
    try:
        data = os.pread(fd, length, offset)
    except OSError as error:
        log.warning("the cache's disk can't read block %d: %s", block, error)
        return 0
    return checksum(data.ljust(length, b"\0"))


async def _drop(store: Store, record: Record, blocks: list[int]) -> int:
    """Check again while nothing else changes the file, and drop the blocks that are still damaged;
    return their number."""
    async with store.registry.lookup:
        file = store.registry.files.get(record.name)
        if file is None:
            store.registry.record_cache.invalidate(record.origin, record.key)
            store.registry.verified_blocks.forget(record.name)
            return await store.registry.change(_drop_idle, store, record, blocks)
    dropped = 0
    for block in blocks:
        evictions, expected = file.evictions, file.blocks.checksum(block)
        found = await trio.to_thread.run_sync(file.compute_checksum, block)
        same = file.evictions == evictions and file.blocks.checksum(block) == expected
        if expected and same and found != expected:
            file.evict([block])
            dropped += 1
    return dropped


def _drop_idle(store: Store, record: Record, blocks: list[int]) -> int:
    """Do so for an idle file. Runs in a thread."""
    index, dropped = store.registry.index, 0
    now = index.find(record.origin, record.key)
    if now is None or now.row != record.row:
        return 0
    path = store.registry.path(record.name)
    changed = {}
    for number in {block // CHUNK_BLOCKS for block in blocks} & now.chunks.keys():
        sums, base = unpack_sums(now.chunks[number]), number * CHUNK_BLOCKS
        here = {b: sums[b - base] for b in blocks if b // CHUNK_BLOCKS == number and sums[b - base]}
        for block in _mismatches(path, now.size, here):
            sums[block - base] = 0
            dropped += 1
        changed[number] = pack_sums(sums)
    left = now.blocks - dropped
    if left > 0:
        index.change_blocks(now.row, changed, left, min(left * BLOCK_BYTES, now.size))
    else:
        store.registry.unlink(now.name)
        index.delete([now.name])
    return dropped


# --- pins ---------------------------------------------------------------------------------------


async def pin(store: Store, place: CachedPath) -> None:
    """Pin a path: its files, and those that will be below it, stay in the cache."""
    await _change_pins(store, place, store.registry.index.pin)


async def unpin(store: Store, place: CachedPath) -> int:
    """Remove the pins at and below a path; return how many there were."""
    return await _change_pins(store, place, store.registry.index.unpin) or 0


async def _change_pins(
    store: Store, place: CachedPath, change: Callable[[str, bytes], int | None]
) -> int | None:
    store.registry.record_cache.invalidate_all()
    changed = await store.in_thread(change, place.origin, place.key)
    store.mark_pinned(place.origin, place.key)
    await store.save()
    return changed


def pin_over(store: Store, place: CachedPath) -> bytes | None:
    """Return the pin that covers the path: itself, or a directory above."""
    return store.registry.index.pin_over(place.origin, place.key)
