"""Directories: listing one with attributes, keeping one alive, renaming one with all below it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import chain
from weakref import WeakValueDictionary

from hpcfs.model import paths
from hpcfs.model.entries import LIST_MAX_ENTRIES, LIST_PAGE_ENTRIES, Entry
from hpcfs.model.errors import NotADirectory, NotFound, PermissionDenied, TooLarge
from hpcfs.remotes.s3.bucket import Bucket
from hpcfs.remotes.s3.caches import ExpiringCache, MetadataCache
from hpcfs.remotes.s3.entries import Entries
from hpcfs.remotes.s3.listing import Collator, Listed, in_order, is_marker
from hpcfs.remotes.s3.markers import Markers
from hpcfs.remotes.s3.metadata import DIRECTORY_MODE, Metadata
from hpcfs.remotes.s3.multipart import each
from hpcfs.remotes.s3.names import shown
from hpcfs.remotes.s3.objects import Info, Page, Summary
from hpcfs.remotes.s3.paths import S3Path, text

HEADS_IN_FLIGHT = 96
"""Of one listing; the site's gate bounds those of all, and gives fewer to what is near."""
SIBLINGS_LOOKED_AT = 5
"""Two kinds of marker, the victim as object and as directory, and one that stays."""


class Lister:
    """Entries of a directory."""

    def __init__(self, bucket: Bucket, markers: Markers, entries: Entries) -> None:
        self._bucket, self._markers, self._entries = bucket, markers, entries
        self.cache = MetadataCache()

    async def pages(self, place: S3Path, *, read_only: bool) -> AsyncIterator[Sequence[Entry]]:
        """`read_only` spares the request per object: attributes are what the listing says.

        Raises NotFound or NotADirectory.
        """
        collator: Collator[Summary] = Collator()
        empty = True
        count = 0
        async for page in self._bucket.pages(place.directory, delimiter="/"):
            count += len(page.objects) + len(page.prefixes)
            if count > LIST_MAX_ENTRIES:
                name = text(place.path)
                raise TooLarge(f"{name}: S3 lists more than {LIST_MAX_ENTRIES:,} names there")
            empty = empty and not page.objects and not page.prefixes
            found = list(_collated(collator, page, place.directory))
            for entries in await self._entries_of(found, place.directory, read_only):
                yield entries
        if empty and not place.is_root:
            await self._refuse(place)
        for entries in await self._entries_of(list(collator.end()), place.directory, read_only):
            yield entries

    async def _refuse(self, place: S3Path) -> None:
        found = await self._bucket.head(place.key) if place.key else None
        if found is not None and found.is_directory:
            return
        if found is not None:
            raise NotADirectory(f"{text(place.path)} is not a directory")
        raise NotFound(f"{text(place.path)}: there is no such directory")

    async def _entries_of(
        self, found: list[Listed[Summary]], directory: str, read_only: bool
    ) -> list[list[Entry]]:
        entries: list[Entry | None] = [None] * len(found)

        old = {one.component for one in found if one.beside and one.item and not one.item.size}

        async def fill(index: int) -> None:
            one = found[index]
            entries[index] = await self._entry(one, directory, read_only, one.component in old)

        await each(range(len(found)), fill, min(len(found), HEADS_IN_FLIGHT))
        there = [entry for entry in entries if entry is not None]
        starts = range(0, len(there), LIST_PAGE_ENTRIES)
        return [there[start : start + LIST_PAGE_ENTRIES] for start in starts]

    async def _entry(
        self, listed: Listed[Summary], directory: str, read_only: bool, old: bool
    ) -> Entry | None:
        """Return the entry of a listed name; None where the object has gone since, or is no entry
        of its own: `old` may be what s3fs wrote for this directory once."""
        name = shown(listed.component, beside=listed.beside)
        if listed.item is None:
            marker = None
            if not read_only:
                prefix = f"{directory}{listed.component}/"
                marker = await self._markers.read(prefix, urgent=False, old=old)
            return self._entries.directory(name, marker.metadata if marker else None)
        found = listed.item if read_only else await self._info(listed.item)
        if isinstance(found, Info) and found.is_directory:
            return None if listed.beside else self._entries.directory(name, found.metadata)
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
    """Watches over parent directories: one must be there for a new entry, and stays when its last
    entry goes."""

    def __init__(self, bucket: Bucket, markers: Markers, base: str) -> None:
        self._bucket, self._markers, self._base = bucket, markers, base
        self._there: ExpiringCache[bool] = ExpiringCache(10.0, 10_000)
        self._marked: ExpiringCache[bool] = ExpiringCache(60.0, 10_000)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def made(self, directory: str) -> None:
        """Note that a marker was written."""
        self._there.put(directory, True)
        self._marked.put(directory, True)

    def forget(self) -> None:
        """Forget which directories were seen."""
        self._there.clear()
        self._marked.clear()

    async def require(self, place: S3Path) -> None:
        """Raise NotFound or NotADirectory where the parent is no directory."""
        parent = place.parent
        if parent == self._base or self._there.get(parent):
            return
        page = await self._bucket.first(parent, 1)
        if not page.objects:
            shown_parent = text(paths.parent(place.path))
            found = await self._bucket.head(parent[:-1])
            if found is None:
                raise NotFound(f"{shown_parent}: there is no such directory")
            if not found.is_directory:
                raise NotADirectory(f"{shown_parent} is not a directory")
            return
        self._there.put(parent, True)

    @asynccontextmanager
    async def kept(self, place: S3Path) -> AsyncIterator[None]:
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

    async def _mark_if_last(self, place: S3Path) -> None:
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
