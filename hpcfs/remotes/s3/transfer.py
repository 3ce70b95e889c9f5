"""Uploads of whole files, and copies on the server: in one request or by parts, side by side."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import IO, Any

from hpcfs.model.entries import NO_HANDLE
from hpcfs.model.errors import (
    Changed,
    Conflict,
    InvalidRequest,
    NotSupported,
    RemoteError,
    RemoteFailure,
    TooLarge,
)
from hpcfs.model.uploads import UploadRequest
from hpcfs.remotes.base import ReportProgress, UploadSource, no_report
from hpcfs.remotes.s3.bucket import Bucket
from hpcfs.remotes.s3.checksums import is_kms
from hpcfs.remotes.s3.metadata import Metadata, encode
from hpcfs.remotes.s3.multipart import Multipart, NewObject, TransferProgress, checked, each, read
from hpcfs.remotes.s3.objects import Info, Summary, is_md5
from hpcfs.remotes.s3.parts import MIB, Growing, Limits, Part, even
from hpcfs.remotes.s3.tags_and_acls import TagsAndAcls

log = logging.getLogger(__name__)
TRIED_BYTES = 64 * 1024
COMPARED_BYTES = 8 * MIB
NO_VERSION = b"0" * 32
"""An ETag that nothing has."""


class FileSource:
    """An open temporary file as the `UploadSource` of an upload."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        file.flush()
        self._descriptor = file.fileno()
        self.size = size
        self.name = secrets.token_hex(8)

    def read(self, offset: int, length: int) -> bytes:
        """Read from the file. Raises RemoteFailure where it is shorter."""
        data = os.pread(self._descriptor, length, offset)
        if len(data) != length:
            raise RemoteFailure(f"a temporary file ended after {offset + len(data)} bytes")
        return data


class Transfer:
    """Uploads and copies of one bucket. With `verify` the server is asked for what it stored."""

    def __init__(self, bucket: Bucket, limits: Limits, *, verify: bool = False) -> None:
        self._bucket, self._limits, self._verify = bucket, limits, verify
        self.tags_and_acls = TagsAndAcls(bucket)

    def check_size(self, key: str, size: int) -> None:
        """Raise TooLarge for a size that no object can have."""
        if size > self._limits.largest_object:
            raise TooLarge(f"{key} has {size} bytes, and S3 holds at most 5 TiB in one object")

    async def upload(
        self, target: NewObject, source: UploadSource, report: ReportProgress
    ) -> Summary:
        """Upload the source and return the object as it is then. Raises Conflict where the server
        honours conditions; where it does not, the caller has compared the version."""
        size = source.size
        self.check_size(target.key, size)
        progress = TransferProgress(report)
        if size > self._limits.single_put:
            made = await self._upload_parts(target, source, progress)
            if self._verify:
                await self._check_stored(made, source)
            return made
        async with self._bucket.sending(size):
            body = await read(source, 0, size)
            etag = await self._put(target, body, progress)
        progress.add(size)
        if etag and not self._verify:
            return Summary(target.key, size, etag, 0)
        made = await checked(self._bucket, target.key, size)
        if self._verify:
            await self._check_stored(made, source)
        return made

    async def _check_stored(self, made: Info, source: UploadSource) -> None:
        """Raise RemoteFailure where the server stored something else. Of an object in parts the
        ETag tells on servers that are known to make it of theirs."""
        told = await self._told_by_etag(made, source)
        joined = self._bucket.server.joins_md5s and not is_kms(made.headers)
        if told is None and "-" in made.etag and joined:
            told = False
        if told is False:
            raise RemoteFailure(f"{made.key}: S3 holds something else: write it again")

    async def _put(self, target: NewObject, body: bytes, progress: TransferProgress) -> str:
        key, base, server = target.key, target.base, self._bucket.server
        metadata, headers = target.metadata, target.headers
        honours = False if base is None or b":" in base else server.honours(base)
        if honours is not False:
            try:
                etag = await self._bucket.put(
                    key, body, metadata, headers, base=base, sent=progress.renew
                )
            except NotSupported:
                assert base is not None
                server.note(base, honours=False)
            else:
                if honours is None and len(body) <= TRIED_BYTES:
                    await self._try_condition(target, body)
                return etag
        return await self._bucket.put(key, body, metadata, headers, sent=progress.renew)

    async def _try_condition(self, target: NewObject, body: bytes) -> None:
        """Find out whether the server honours conditions or ignores them: what was just written is
        written again, on a condition that does not hold. Once for each kind and process."""
        assert target.base is not None
        server, kind = self._bucket.server, NO_VERSION if target.base else b""
        if server.being_tried:
            return
        server.being_tried = True
        try:
            await self._bucket.put(target.key, body, target.metadata, target.headers, base=kind)
        except Conflict:
            server.note(kind, honours=True)
        except RemoteError as error:
            log.debug("whether the server honours conditions is not known: %s", error.message)
        else:
            server.note(kind, honours=False)
            log.info("this S3 server ignores conditions: versions are compared before writing")
        finally:
            server.being_tried = False

    async def _upload_parts(
        self, target: NewObject, source: UploadSource, progress: TransferProgress
    ) -> Info:
        async def send(upload: Multipart, part: Part) -> None:
            await upload.send_from(part, source, self._limits.buffered_part, progress)
            progress.add(part.length)

        return await self._by_parts(target, source.size, self._whole(source.size), send, progress)

    def _whole(self, size: int) -> list[Part]:
        return even(size, self._limits.part_size(size, self._limits.upload_part))

    async def copy(
        self,
        source: Info,
        key: str,
        metadata: Metadata | None = None,
        report: ReportProgress = no_report,
        tags: Mapping[str, Any] = MappingProxyType({}),
    ) -> Summary:
        """Copy on the server, or rewrite the metadata where `key` is the source's own. What the
        server says of the copy tells that it is whole; where it does not, it is asked again.
        `tags` are for the copy of an object without any."""
        if source.size <= self._limits.single_copy:
            access = await self.tags_and_acls.access(source.key)
            etag = await self._bucket.copy(
                source, key, metadata, {**source.headers, **access, **tags}
            )
            self.tags_and_acls.has(key, access)
            if etag and (key == source.key or etag == source.etag):
                return Summary(key, source.size, etag, 0)
            return await checked(self._bucket, key, source.size)
        headers = {**await self.tags_and_acls.of(source), **tags}
        target = NewObject(key, metadata or source.metadata, headers)
        return await self._copy_parts(source, target, report)

    async def copy_listed(self, source: Summary, key: str, report: ReportProgress) -> str:
        """Copy what a listing showed, without asking for its headers where that can be spared.
        Returns the copy's ETag."""
        if source.size <= self._limits.single_copy:
            access = await self.tags_and_acls.access(source.key)
            etag = await self._bucket.copy(source, key, headers=access)
            return etag or (await checked(self._bucket, key, source.size)).etag
        info = await self._bucket.head(source.key)
        if info is None:
            raise Changed(f"{source.key} was removed on the server while it was renamed")
        return (await self.copy(info, key, report=report)).etag

    async def copy_marker(self, source: Summary, key: str) -> None:
        """Copy the marker of a directory. Where the server does not copy it (versitygw), it is
        written anew."""
        server = self._bucket.server
        if server.copies_markers is not False:
            try:
                access = await self.tags_and_acls.access(source.key)
                await self._bucket.copy(source, key, headers=access)
            except (NotSupported, RemoteFailure, InvalidRequest) as error:
                log.debug("a marker is written anew: %s", error.message)
            else:
                return
        info = await self._bucket.head(source.key)
        if info is None:
            raise Changed(f"{source.key} was removed on the server while it was renamed")
        await self._bucket.put(key, b"", info.metadata, await self.tags_and_acls.of(info))
        server.copies_markers = False

    async def _copy_parts(self, source: Info, target: NewObject, report: ReportProgress) -> Info:
        progress = TransferProgress(report)

        async def send(upload: Multipart, part: Part) -> None:
            try:
                await upload.copy(part, source)
            except NotSupported:
                raise NotSupported(
                    f"{source.key} is too large to be renamed or changed on this S3 server, "
                    "which can't copy by parts: copy it to a new name instead"
                ) from None
            progress.add(part.length)

        parts = even(source.size, self._limits.part_size(source.size, self._limits.copy_part))
        return await self._by_parts(target, source.size, parts, send, progress)

    async def _by_parts(
        self,
        target: NewObject,
        size: int,
        parts: Sequence[Part],
        send: Callable[[Multipart, Part], Awaitable[None]],
        progress: TransferProgress,
    ) -> Info:
        upload = await Multipart.begin(self._bucket, target)

        async def one(part: Part) -> None:
            await send(upload, part)

        try:
            await each(parts, one, self._limits.parts_in_flight)
            return await upload.complete(size, len(parts))
        except BaseException:
            await asyncio.shield(upload.abort())
            raise

    async def holds(
        self, found: Info, source: UploadSource, metadata: Metadata, request: UploadRequest
    ) -> bool:
        """Whether an object is what an upload would make of `source`: that one was made already,
        and its answer was lost. Where the ETag does not tell, our metadata does, whose time has
        nanoseconds, and the bytes that were written."""
        if found.size != source.size:
            return False
        told = await self._told_by_etag(found, source) if request.whole else None
        if told is not None:
            return told
        if encode(found.metadata) != encode(metadata):
            return False
        ranges = [(0, source.size)] if request.handle != NO_HANDLE else request.ranges
        return await self._has_bytes(found, source, ranges)

    async def _told_by_etag(self, found: Info, source: UploadSource) -> bool | None:
        """Whether an object of the same size is this file. None where the ETag does not tell: an
        encrypted object's, or one of parts that were cut in another way."""
        if is_md5(found.etag):
            if is_kms(found.headers):
                return None
            return await asyncio.to_thread(_md5, source) == found.etag
        growing = Growing(self._limits.upload_part, self._limits.parts_per_step)
        for parts in (self._whole(source.size), list(growing.parts(source.size))):
            if found.etag.endswith(f"-{len(parts)}"):
                joined = await asyncio.to_thread(_joined_md5s, source, parts)
                if joined == found.etag:
                    return True
        return None

    async def _has_bytes(
        self, found: Info, source: UploadSource, ranges: Sequence[tuple[int, int]]
    ) -> bool:
        for start, length in ranges:
            for offset in range(start, start + length, COMPARED_BYTES):
                count = min(COMPARED_BYTES, start + length - offset)
                try:
                    theirs = await self._bucket.get(
                        found.key, found.version, offset, count, urgent=False
                    )
                except Changed:
                    return False
                if theirs != await read(source, offset, count):
                    return False
        return True


def _md5(source: UploadSource) -> str:
    return next(_md5s(source, [Part(1, 0, source.size)])).hex()


def _joined_md5s(source: UploadSource, parts: Sequence[Part]) -> str:
    joined = b"".join(_md5s(source, parts))
    return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(parts)}"


def _md5s(source: UploadSource, parts: Sequence[Part]) -> Iterator[bytes]:
    for part in parts:
        digest = hashlib.md5(usedforsecurity=False)
        for offset in range(part.offset, part.end, MIB):
            digest.update(source.read(offset, min(MIB, part.end - offset)))
        yield digest.digest()
