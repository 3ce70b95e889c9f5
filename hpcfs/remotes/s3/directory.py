"""Directories: listing one with attributes, keeping one alive, renaming one with all below it."""

from __future__ import annotations

import asyncio
import logging
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import chain
from typing import IO
from weakref import WeakValueDictionary

from hpcfs.remotes.s3.bucket import Bucket, Info, Page, Summary
from hpcfs.remotes.s3.entries import Entries
from hpcfs.remotes.s3.known import Known, MetadataCache
from hpcfs.remotes.s3.listing import Collator, Listed, in_order, is_marker
from hpcfs.remotes.s3.markers import Markers
from hpcfs.remotes.s3.metadata import DIRECTORY_MODE, Metadata
from hpcfs.remotes.s3.names import checked_key, shown
from hpcfs.remotes.s3.paths import Place, text
from hpcfs.remotes.s3.transfer import Transfer, each
from hpcfs.transfer.messages import (
    LIST_PAGE_ENTRIES,
    Entry,
    NotADirectory,
    NotFound,
    PermissionDenied,
    RemoteError,
)

log = logging.getLogger(__name__)
HEADS_IN_FLIGHT = 96
"""Of one listing; the site's gate bounds those of all, and gives fewer to what is near."""
COPIES_IN_FLIGHT = 16
SIBLINGS_LOOKED_AT = 5
"""Two kinds of marker, the victim as object and as directory, and one that stays."""
KEY_LENGTH = struct.Struct(">H")


class Lister:
    """Entries of a directory."""

    def __init__(self, bucket: Bucket, markers: Markers, entries: Entries) -> None:
        self._bucket, self._markers, self._entries = bucket, markers, entries
        self.cache = MetadataCache()

    async def pages(self, place: Place, *, read_only: bool) -> AsyncIterator[Sequence[Entry]]:
        """`read_only` spares the request per object: attributes are what the listing says.

        Raises NotFound or NotADirectory.
        """
        collator: Collator[Summary] = Collator()
        empty = True
        async for page in self._bucket.pages(place.directory, delimiter="/"):
            empty = empty and not page.objects and not page.prefixes
            found = list(_collated(collator, page, place.directory))
            for entries in await self._entries_of(found, place.directory, read_only):
                yield entries
        if empty and not place.is_root:
            await self._refuse(place)
        for entries in await self._entries_of(list(collator.end()), place.directory, read_only):
            yield entries

    async def _refuse(self, place: Place) -> None:
        if place.key and await self._bucket.head(place.key) is not None:
            raise NotADirectory(f"{text(place.path)} is not a directory")
        raise NotFound(f"{text(place.path)}: there is no such directory")

    async def _entries_of(
        self, found: list[Listed[Summary]], directory: str, read_only: bool
    ) -> list[list[Entry]]:
        entries: list[Entry | None] = [None] * len(found)

        async def fill(index: int) -> None:
            entries[index] = await self._entry(found[index], directory, read_only)

        await each(range(len(found)), fill, min(len(found), HEADS_IN_FLIGHT))
        there = [entry for entry in entries if entry is not None]
        starts = range(0, len(there), LIST_PAGE_ENTRIES)
        return [there[start : start + LIST_PAGE_ENTRIES] for start in starts]

    async def _entry(
        self, listed: Listed[Summary], directory: str, read_only: bool
    ) -> Entry | None:
        """None where the object has gone since it was listed."""
        name = shown(listed.component, beside=listed.beside)
        if listed.item is None:
            marker = None
            if not read_only:
                marker = await self._markers.read(f"{directory}{listed.component}/", urgent=False)
            return self._entries.directory(name, marker.metadata if marker else None)
        found = listed.item if read_only else await self._info(listed.item)
        return self._entries.file(name, found) if found is not None else None

    async def _info(self, listed: Summary) -> Summary | None:
        info: Info | None = self.cache.get(listed)
        if info is not None:
            return info
        try:
            info = await self._bucket.head(listed.key, urgent=False)
        except PermissionDenied:  # listing is allowed and reading is not: show what is known
            return listed
        if info is not None:
            self.cache.put(listed, info)
        return info


def _collated(collator: Collator[Summary], page: Page, directory: str) -> Iterator[Listed[Summary]]:
    skip = len(directory)
    objects = [
        (item.key[skip:], item)
        for item in page.objects
        if not is_marker(item.key[skip:], item.size)
    ]
    names = in_order(objects, [prefix[skip:] for prefix in page.prefixes])
    return chain.from_iterable(
        collator.prefix(name) if item is None else collator.object(name, item)
        for name, item in names
    )


class Parents:
    """A path's directory: it must be there for a new entry, and stays when its last one goes."""

    def __init__(self, bucket: Bucket, markers: Markers, base: str) -> None:
        self._bucket, self._markers, self._base = bucket, markers, base
        self._there: Known[bool] = Known(10.0, 10_000)
        self._marked: Known[bool] = Known(60.0, 10_000)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def made(self, directory: str) -> None:
        """A marker was written."""
        self._there.put(directory, True)
        self._marked.put(directory, True)

    def forget(self) -> None:
        self._there.clear()
        self._marked.clear()

    async def require(self, place: Place) -> None:
        """Raises NotFound or NotADirectory."""
        parent = place.parent
        if parent == self._base or self._there.get(parent):
            return
        page = await self._bucket.first(parent, 1)
        if not page.objects:
            shown_parent = text(place.path.rpartition(b"/")[0])
            if await self._bucket.head(parent[:-1]) is not None:
                raise NotADirectory(f"{shown_parent} is not a directory")
            raise NotFound(f"{shown_parent}: there is no such directory")
        self._there.put(parent, True)

    @asynccontextmanager
    async def kept(self, place: Place) -> AsyncIterator[None]:
        """Around the removal of `place`: a marker is written where nothing else would be left.

        Before and not after, so that no reader sees the directory missing; one removal at a time
        in a directory without a marker, so that the last two don't rely on each other.
        """
        parent = place.parent
        if parent == self._base or self._marked.get(parent):
            yield
            return
        lock = self._locks.setdefault(parent, asyncio.Lock())
        async with lock:
            await self._mark_if_last(place)
            yield

    async def _mark_if_last(self, place: Place) -> None:
        parent = place.parent
        page = await self._bucket.first(parent, SIBLINGS_LOOKED_AT, delimiter="/")
        if any(is_marker(item.key[len(parent) :], item.size) for item in page.objects):
            self._marked.put(parent, True)
            return
        names = {item.key for item in page.objects} | set(page.prefixes)
        if names - {place.key, place.directory}:
            return
        await self._markers.write(parent, Metadata(mode=DIRECTORY_MODE, mtime_ns=time.time_ns()))
        self.made(parent)


class Mover:
    """Renames everything below a prefix: all copies first, then the removals.

    Whatever interrupts it, every object is still there under one of its names. What was copied is
    noted in a file: a directory may hold more keys than memory, and only what was copied may be
    removed, not what others added meanwhile.
    """

    def __init__(self, bucket: Bucket, transfer: Transfer, spool_dir: str) -> None:
        self._bucket, self._transfer, self._spool_dir = bucket, transfer, spool_dir

    async def move(self, source: str, target: str) -> None:
        with tempfile.TemporaryFile(dir=self._spool_dir) as spool:
            try:
                await self._copy_all(source, target, spool)
            except BaseException:
                await asyncio.shield(self._take_back(target, spool))
                raise
            await self._delete_all(source, spool)

    async def _copy_all(self, source: str, target: str, spool: IO[bytes]) -> None:
        async def copy(item: Summary) -> None:
            rest = item.key[len(source) :]
            await self._transfer.copy_listed(item, checked_key(target + rest))
            raw = rest.encode()
            spool.write(KEY_LENGTH.pack(len(raw)) + raw)

        async for page in self._bucket.pages(source):
            await each(page.objects, copy, COPIES_IN_FLIGHT)

    async def _take_back(self, target: str, spool: IO[bytes]) -> None:
        """Remove the copies of a rename that failed; the directory was there and empty, or not."""
        try:
            await self._delete_all(target, spool, markers=False)
        except RemoteError as error:  # the failure that led here is the one to report
            log.warning("copies of a rename that failed stay below %s: %s", target, error.message)

    async def _delete_all(self, directory: str, spool: IO[bytes], *, markers: bool = True) -> None:
        async def delete(rest: str) -> None:
            if markers or not is_marker(rest, 0):
                await self._bucket.delete(directory + rest)

        spool.seek(0)
        await each(_keys_in(spool), delete, COPIES_IN_FLIGHT)


def _keys_in(spool: IO[bytes]) -> Iterator[str]:
    while header := spool.read(KEY_LENGTH.size):
        yield spool.read(KEY_LENGTH.unpack(header)[0]).decode()
