"""Objects too large for one request: uploads and server-side copies by parts.

Parts run side by side, in bounded memory: small ones are read whole, larger ones are streamed from
the file. A multipart upload that fails or is cancelled is aborted, because S3 keeps, and charges
for, the parts of those that are not.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, TypeVar, cast

from hpcfs.remotes.base import ReportProgress, Source
from hpcfs.remotes.s3.bucket import Bucket, Info, Summary
from hpcfs.remotes.s3.metadata import Metadata
from hpcfs.transfer.messages import Changed, NotSupported, RemoteError, RemoteFailure, TooLarge

log = logging.getLogger(__name__)
T = TypeVar("T")
MIB = 1024 * 1024
GIB = 1024 * MIB


@dataclass(frozen=True)
class Limits:
    """S3's limits, and what is used of them. Sizes in bytes."""

    largest_object: int = 5 * 1024 * GIB
    most_parts: int = 10_000
    single_put: int = 16 * MIB
    """Larger files go by parts: side by side they are faster, and a failure costs one part."""
    upload_part: int = 8 * MIB
    single_copy: int = 5 * GIB
    copy_part: int = 512 * MIB
    buffered_part: int = 64 * MIB
    """Larger parts are streamed from the file instead of being read first."""
    parts_in_flight: int = 4

    def part_size(self, size: int, smallest: int) -> int:
        """The smallest that suffices, a multiple of `smallest` up to 8 MiB, then of 1 MiB."""
        needed = -(-size // self.most_parts)
        unit = min(smallest, MIB)
        return max(smallest, -(-needed // unit) * unit)


class SourceWindow(io.RawIOBase):
    """A part of a `Source` as a file: what botocore can send without holding it in memory."""

    def __init__(self, source: Source, offset: int, length: int) -> None:
        self._source, self._offset, self._length, self._position = source, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), max(0, self._length - self._position))
        buffer[:length] = self._source.read(self._offset + self._position, length)
        self._position += length
        return length


class FileSource:
    """An open temporary file as the `Source` of an upload."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        file.flush()
        self._descriptor = file.fileno()
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._descriptor, length, offset)
        if len(data) != length:
            raise RemoteFailure(f"a temporary file ended after {offset + len(data)} bytes")
        return data


async def each(items: Iterable[T], work: Callable[[T], Awaitable[None]], limit: int) -> None:
    """Run `work` for every item, `limit` at a time; the first failure ends all and is raised."""
    remaining = iter(items)

    async def worker() -> None:
        for item in remaining:  # shared: an item is taken without an await in between
            await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(limit):
                group.create_task(worker())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


class Transfer:
    """Uploads and copies of one bucket."""

    def __init__(self, bucket: Bucket, limits: Limits) -> None:
        self._bucket = bucket
        self._limits = limits

    def check_size(self, key: str, size: int) -> None:
        if size > self._limits.largest_object:
            raise TooLarge(f"{key} has {size} bytes, and S3 holds at most 5 TiB in one object")

    async def upload(
        self,
        key: str,
        source: Source,
        metadata: Metadata,
        headers: Mapping[str, Any],
        report: ReportProgress,
    ) -> Summary:
        """The object as it is then."""
        size = source.size
        self.check_size(key, size)
        if size > self._limits.single_put:
            return await self._upload_parts(key, source, metadata, headers, report)
        body = await asyncio.to_thread(source.read, 0, size)
        md5 = hashlib.md5(body, usedforsecurity=False).hexdigest()
        etag = await self._bucket.put(key, body, metadata, headers, md5)
        report(size)
        if not etag:
            return await self._checked(key, size)
        return Summary(key, size, etag, 0)

    async def _upload_parts(
        self,
        key: str,
        source: Source,
        metadata: Metadata,
        headers: Mapping[str, Any],
        report: ReportProgress,
    ) -> Summary:
        done = 0

        async def send(upload: str, number: int, offset: int, length: int) -> dict[str, Any]:
            nonlocal done
            body: bytes | BinaryIO
            if length > self._limits.buffered_part:
                body = cast(BinaryIO, io.BufferedReader(SourceWindow(source, offset, length), MIB))
            else:
                body = await asyncio.to_thread(source.read, offset, length)
            part = await self._bucket.upload_part(key, upload, number, body)
            done += length
            report(done)
            return part

        part_size = self._limits.part_size(source.size, self._limits.upload_part)
        await self._by_parts(key, metadata, headers, source.size, part_size, send)
        return await self._checked(key, source.size)

    async def copy(self, source: Info, key: str, metadata: Metadata | None = None) -> Summary:
        """Copy on the server, or rewrite the metadata where `key` is the source's own.

        Returns once the copy was seen to be there, whole.
        """
        if source.size <= self._limits.single_copy:
            etag = await self._bucket.copy(source, key, metadata, source.headers)
            if key == source.key and etag:
                return Summary(key, source.size, etag, 0)
        else:
            await self._copy_parts(source, key, metadata or source.metadata)
        return await self._checked(key, source.size)

    async def copy_listed(self, source: Summary, key: str) -> None:
        """Copy what a listing showed, without asking for its headers where that can be spared."""
        if source.size <= self._limits.single_copy:
            if not await self._bucket.copy(source, key):
                await self._checked(key, source.size)
            return
        info = await self._bucket.head(source.key)
        if info is None:
            raise Changed(f"{source.key} was removed on the server while it was renamed")
        await self.copy(info, key)

    async def _copy_parts(self, source: Info, key: str, metadata: Metadata) -> None:
        async def send(upload: str, number: int, offset: int, length: int) -> dict[str, Any]:
            try:
                return await self._bucket.copy_part(key, upload, number, source, offset, length)
            except NotSupported:
                raise NotSupported(
                    f"{source.key} is too large to be renamed or changed on this S3 server, "
                    "which can't copy by parts: copy it to a new name instead"
                ) from None

        part_size = self._limits.part_size(source.size, self._limits.copy_part)
        await self._by_parts(key, metadata, source.headers, source.size, part_size, send)

    async def _by_parts(
        self,
        key: str,
        metadata: Metadata,
        headers: Mapping[str, Any],
        size: int,
        part_size: int,
        send: Callable[[str, int, int, int], Awaitable[dict[str, Any]]],
    ) -> None:
        upload = await self._bucket.create_upload(key, metadata, headers)
        parts: dict[int, dict[str, Any]] = {}

        async def part(number: int) -> None:
            offset = (number - 1) * part_size
            parts[number] = await send(upload, number, offset, min(part_size, size - offset))

        try:
            numbers = range(1, -(-size // part_size) + 1)
            await each(numbers, part, self._limits.parts_in_flight)
            in_order = [parts[number] for number in numbers]
            await self._bucket.complete_upload(key, upload, in_order)
        except BaseException:
            await asyncio.shield(self._abort(key, upload))
            raise

    async def _abort(self, key: str, upload: str) -> None:
        try:
            await self._bucket.abort_upload(key, upload)
        except RemoteError as error:  # the failure that led here is the one to report
            log.warning("the parts of an unfinished upload may stay on S3: %s", error.message)

    async def _checked(self, key: str, size: int) -> Summary:
        """What is there now: ETags in answers to uploads and copies are not always the object's."""
        found = await self._bucket.head(key)
        if found is None:
            raise Changed(f"{key} was removed on the server while it was written")
        if found.size != size:
            raise RemoteFailure(f"{key}: S3 holds {found.size} bytes of {size}: write it again")
        return found
