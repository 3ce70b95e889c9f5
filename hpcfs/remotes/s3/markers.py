"""Marker objects: what makes a directory exist while nothing is in it, and keeps its attributes.

The common form, which s3fs, rclone and S3's console share, is an empty object "a/". But some
servers store objects as files and can't keep "a/" apart from "a" (rclone's `serve s3` makes a file
"a", and then refuses "a/b"). There the marker is an empty object of a reserved name inside it.
Which kind the server is shows in an object that is there already, or in the first marker written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from hpcfs.remotes.s3.bucket import Bucket
from hpcfs.remotes.s3.caches import ExpiringCache
from hpcfs.remotes.s3.metadata import Metadata
from hpcfs.remotes.s3.names import MARKER
from hpcfs.remotes.s3.objects import Info, Page

HEADERS: Mapping[str, Any] = {"ContentType": "application/x-directory"}
REMEMBERED_SECONDS = 2.0
"""Shorter than a user notices that a change made elsewhere is late, longer than `ls -l` takes."""


class Markers:
    """Directories are given by their prefix, which ends in "/" (or is "" for a whole bucket)."""

    def __init__(self, bucket: Bucket, base: str) -> None:
        self._bucket = bucket
        self._base = base
        self._inside: bool | None = None
        self._sample: str | None = None
        self._lock = asyncio.Lock()
        self._read: ExpiringCache[tuple[Info | None]] = ExpiringCache(REMEMBERED_SECONDS, 10_000)

    def saw(self, page: Page) -> None:
        """The root's beginning, which has an object to tell by: a round trip is spared later."""
        self._sample = page.objects[0].key if page.objects else None

    async def read(
        self,
        directory: str,
        *,
        urgent: bool = True,
        listed: Sequence[str] | None = None,
        old: bool = False,
    ) -> Info | None:
        """`listed` are the markers with which a listing of the directory begins: its own key comes
        before all others, so one that is not among them need not be asked for. `old`: there may be
        one without a slash (see objects.Info.is_directory)."""
        known = self._read.get(directory)
        if known is None:
            key = directory + MARKER if await self._is_inside() else directory
            old = old or (listed is not None and directory[:-1] in listed)
            found = None
            if listed is None or key != directory or key in listed:
                found = await self._bucket.head(key, urgent=urgent)
            elif not old:
                return None
            if found is None and old:
                found = await self._bucket.head(directory[:-1], urgent=urgent)
                found = found if found is not None and found.is_directory else None
            known = (found if found is not None and found.size == 0 else None,)
            self._read.put(directory, known)
        return known[0]

    async def write(
        self, directory: str, metadata: Metadata, headers: Mapping[str, Any] = HEADERS
    ) -> None:
        """Write the marker of a directory, in the form that this bucket already has."""
        self._read.drop(directory)
        if await self._is_inside():
            await self._bucket.put(directory + MARKER, b"", metadata, headers)
        else:
            await self._bucket.put(directory, b"", metadata, headers)
        if self._inside is None:
            await self._learn_from(directory, metadata)

    async def remove(self, directory: str, keys: list[str]) -> None:
        """`keys` are the markers that a listing showed: other programs may have written both."""
        self._read.drop(directory)
        for key in keys:
            await self._bucket.delete(key)

    def forget(self) -> None:
        """Forget the markers that were read."""
        self._read.clear()

    async def _is_inside(self) -> bool:
        if self._inside is None:
            async with self._lock:
                if self._inside is None:
                    self._inside = await self._look_for_kind()
        return bool(self._inside)

    async def _look_for_kind(self) -> bool | None:
        """Find out the kind of marker; None while there is no object to tell by."""
        sample = self._sample
        if sample is None:
            page = await self._bucket.first(self._base, 1)
            if not page.objects:
                return None
            sample = page.objects[0].key
        if sample.endswith("/"):
            return False
        found, listed = await asyncio.gather(
            self._bucket.head(sample + "/"), self._is_listed(sample + "/"), return_exceptions=True
        )
        for failure in (listed, found):
            if isinstance(failure, BaseException):
                raise failure
        return found is not None and not listed

    async def _learn_from(self, directory: str, metadata: Metadata) -> None:
        """Look, after the first marker, whether it is there under its own key."""
        self._inside = not await self._is_listed(directory)
        if self._inside:
            await self._bucket.delete(directory)
            await self._bucket.put(directory + MARKER, b"", metadata, HEADERS)

    async def _is_listed(self, key: str) -> bool:
        page = await self._bucket.first(key, 1)
        return bool(page.objects) and page.objects[0].key == key
