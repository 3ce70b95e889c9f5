"""Multipart uploads: one object sent, or copied on the server, in parts.

One that fails or is given up is aborted, because S3 keeps, and charges for, the parts of those that
are not.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar, cast

from hpcfs.model.errors import Changed, Conflict, NotSupported, RemoteError, RemoteFailure
from hpcfs.remotes.base import ReportProgress, UploadSource
from hpcfs.remotes.s3 import deadlines
from hpcfs.remotes.s3.bucket import Bucket, MultipartSession
from hpcfs.remotes.s3.checksums import PartSent
from hpcfs.remotes.s3.metadata import Metadata
from hpcfs.remotes.s3.objects import Info, Summary, is_md5
from hpcfs.remotes.s3.parts import MIB, Part
from hpcfs.remotes.s3.translate import s3_code

log = logging.getLogger(__name__)
T = TypeVar("T")
RENEWED_SECONDS = 1.0
BEAT_SECONDS = 10.0
REFUSAL_SECONDS = 10.0
"""How long a part whose upload is gone waits for what the server says of the parts beside it."""
INLINE_BYTES = 256 * 1024
"""Reading more than this from a file is left to a thread."""


@dataclass(frozen=True)
class NewObject:
    """The object that an upload makes, and the version that it replaces (see UploadRequest)."""

    key: str
    metadata: Metadata
    headers: Mapping[str, Any]
    base: bytes | None = None


class TransferProgress:
    """Counts what is done and reports it; at times it reports only that the transfer still
    moves."""

    def __init__(self, report: ReportProgress) -> None:
        self._report = report
        self._done = 0
        self._told = time.monotonic()

    def add(self, count: int) -> None:
        """Count bytes (renames: objects) that are done, and report them."""
        self._done += count
        self._tell()

    def renew(self) -> None:
        """Report again that the transfer moves, once a second at most."""
        if time.monotonic() - self._told > RENEWED_SECONDS:
            self._tell()

    async def beat(self) -> None:
        """Report every few seconds, until cancelled."""
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        self._report(self._done)


@asynccontextmanager
async def renewed(progress: TransferProgress) -> AsyncIterator[None]:
    """Report every few seconds, while something else of this process is waited for that ends by
    itself."""
    beat = asyncio.create_task(progress.beat())
    try:
        yield
    finally:
        beat.cancel()


class SourceWindow(io.RawIOBase):
    """A part of an `UploadSource` as a file, which botocore can send without holding it in
    memory."""

    def __init__(self, source: UploadSource, offset: int, length: int) -> None:
        self._source, self._offset, self._length, self._position = source, offset, length, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True: botocore rewinds what it sends again."""
        return True

    def tell(self) -> int:
        """Return the position in bytes from the window's start."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position, as io.IOBase does."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer from the source; returns how many bytes that were."""
        length = min(len(buffer), max(0, self._length - self._position))
        buffer[:length] = self._source.read(self._offset + self._position, length)
        self._position += length
        return length


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


async def read(source: UploadSource, offset: int, length: int) -> bytes:
    """Read a range of the source; a large one in a thread."""
    if length <= INLINE_BYTES:
        return source.read(offset, length)
    return await asyncio.to_thread(source.read, offset, length)


def stands_on(found: Info | None, base: bytes) -> bool:
    """Whether what is there is what an upload with this `base` may replace."""
    return found.has_version(base) if found is not None and base else found is None and not base


def check_base(key: str, found: Info | None, base: bytes | None) -> None:
    """Raise Conflict where the version that is there is not the one that may be replaced."""
    if base is not None and not stands_on(found, base):
        raise Conflict(
            f"{key} is not what it was when it was opened: the server has another version"
        )


async def checked(bucket: Bucket, key: str, size: int) -> Info:
    """Return what is there now: ETags in answers to uploads and copies are not always the
    object's."""
    found = await bucket.head(key)
    if found is None:
        raise Changed(f"{key} was removed on the server while it was written")
    if found.size != size:
        raise RemoteFailure(f"{key}: S3 holds {found.size} bytes of {size}: write it again")
    return found


class Multipart:
    """One multipart upload. Parts come in any order, and may be sent again."""

    def __init__(self, bucket: Bucket, target: NewObject, upload: MultipartSession) -> None:
        self.target = target
        self._bucket, self._upload = bucket, upload
        self._parts: dict[int, tuple[int, PartSent]] = {}
        """Length and what the server said, by number."""
        self._under_way = 0
        """Parts that are sent or copied now."""
        self._refusal: RemoteError | None = None
        """Of the first of them that was refused."""
        self._news = asyncio.Event()

    @classmethod
    async def begin(cls, bucket: Bucket, target: NewObject) -> Multipart:
        """Begin an upload on the server."""
        upload = await bucket.create_upload(target.key, target.metadata, target.headers)
        return cls(bucket, target, upload)

    def has(self, part: Part) -> bool:
        """Return whether the part was sent, with this length."""
        found = self._parts.get(part.number)
        return found is not None and found[0] == part.length

    async def send(self, part: Part, body: bytes | BinaryIO, progress: TransferProgress) -> None:
        """Send a part, or send it again. Raises RemoteError."""
        key, number = self.target.key, part.number
        self._parts.pop(number, None)
        async with self._beside_others():
            sent = await self._bucket.upload_part(key, self._upload, number, body, progress.renew)
        self._parts[number] = part.length, sent

    async def send_from(
        self, part: Part, source: UploadSource, buffered: int, progress: TransferProgress
    ) -> None:
        """`buffered` is how much may be in memory at once: larger parts are streamed."""
        size = min(part.length, buffered)
        async with self._bucket.sending(size):
            if part.length > buffered:
                window = SourceWindow(source, part.offset, part.length)
                body: bytes | BinaryIO = cast(BinaryIO, io.BufferedReader(window, MIB))
            else:
                body = await read(source, part.offset, part.length)
            await self.send(part, body, progress)

    async def copy(self, part: Part, source: Summary) -> None:
        """Copy the same range of another object on the server as this part. Raises NotSupported,
        Changed."""
        async with self._beside_others():
            found = await self._bucket.copy_part(
                self.target.key, self._upload, part.number, source, part.offset, part.length
            )
        self._parts[part.number] = part.length, found

    @asynccontextmanager
    async def _beside_others(self) -> AsyncIterator[None]:
        """Raise the refusal of the first part for those beside it: some servers (rclone's) end an
        upload with the first part that they refuse, and answer those beside it that there is no
        such upload, perhaps first."""
        if not self._under_way:
            self._refusal = None
        self._under_way += 1
        ended = None
        try:
            yield
        except RemoteError as error:
            if s3_code(error) != "NoSuchUpload":
                self._refusal = self._refusal or error
                raise
            ended = error
        finally:
            self._under_way -= 1
            self._news.set()
        if ended is not None:
            raise await self._refused(ended)

    async def _refused(self, ended: RemoteError) -> RemoteError:
        with suppress(TimeoutError):
            async with asyncio.timeout(REFUSAL_SECONDS):
                while self._refusal is None and self._under_way:
                    self._news.clear()
                    await self._news.wait()
        return self._refusal or ended

    async def are_whole(self, parts: Iterable[Part]) -> bool:
        """Whether the server has these parts as long as they should be."""
        found = await self._bucket.parts(self.target.key, self._upload)
        return all(found.get(part.number) == part.length for part in parts)

    async def complete(self, size: int, count: int) -> Info:
        """The object of parts 1 to `count`, as it is then.

        The server is asked for the present version just before, because some that honour conditions
        elsewhere ignore them here. Raises Conflict; Changed where the upload is gone.
        """
        target, bucket = self.target, self._bucket
        if target.base is not None:
            check_base(target.key, await bucket.head(target.key), target.base)
        parts = [self._parts[number][1] for number in range(1, count + 1)]
        try:
            with deadlines.silence(deadlines.for_bytes(size)):
                etag = await self._complete(parts)
        except (Conflict, Changed) as error:
            return await self._completed_before(error, size, count)
        self._check_etag(etag, count)
        return await checked(bucket, target.key, size)

    async def _complete(self, parts: Sequence[PartSent]) -> str:
        key, base, server = self.target.key, self.target.base, self._bucket.server
        if base is not None and server.honours(base) is not False:
            try:
                return await self._bucket.complete_upload(key, self._upload, parts, base)
            except NotSupported:
                server.note(base, honours=False)
        return await self._bucket.complete_upload(key, self._upload, parts)

    async def _completed_before(self, error: RemoteError, size: int, count: int) -> Info:
        """Return the object if an earlier request completed it: one whose answer was lost is
        repeated, and then refused."""
        expected = self._joined_etag(count)
        found = await self._bucket.head(self.target.key)
        if found is not None and expected and (found.etag, found.size) == (expected, size):
            return found
        raise error

    def _joined_etag(self, count: int) -> str | None:
        """Return the ETag that AWS makes of the parts' MD5s; None where it can't be told."""
        sent = [self._parts[number][1] for number in range(1, count + 1)]
        known = [part for part in sent if part.md5 is not None]
        if not known or any(part.md5 is None or part.etag != part.md5.hex() for part in known):
            return None
        if not all(is_md5(part.etag) for part in sent):
            return None
        joined = b"".join(bytes.fromhex(part.etag) for part in sent)
        return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{count}"

    def _check_etag(self, etag: str, count: int) -> None:
        expected, server = self._joined_etag(count), self._bucket.server
        if expected is None or "-" not in etag:
            return
        if etag == expected:
            server.joins_md5s = True
        elif server.joins_md5s:
            key = self.target.key
            raise RemoteFailure(f"{key}: what S3 made of its parts is not the file: write it again")
        else:
            server.joins_md5s = False
            log.info("this S3 server makes ETags in a way of its own: %s, not %s", etag, expected)

    async def abort(self) -> None:
        """Give the upload up, so that the server frees its parts. Failures are logged only."""
        try:
            await self._bucket.abort_upload(self.target.key, self._upload)
        except RemoteError as error:  # the failure that led here is the one to report
            if s3_code(error) != "NoSuchUpload":
                log.warning("the parts of an unfinished upload may stay on S3: %s", error.message)
