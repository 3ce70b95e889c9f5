"""Changes to a large object: the server copies what stays, and only the rest is sent.

The bytes that a part needs besides those that were written are read from the server, where the
source does not have it. The old version must be there from the first to the last request: each of
them says which one it means, and where a server does not honour that, the last look before the end
tells.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterator, Sequence

from hpcfs.model.errors import Changed, Conflict, NotSupported, RemoteFailure
from hpcfs.model.uploads import UploadRequest
from hpcfs.remotes.base import ReportProgress, UploadSource
from hpcfs.remotes.s3.bucket import Bucket
from hpcfs.remotes.s3.multipart import Multipart, NewObject, TransferProgress, each, read
from hpcfs.remotes.s3.objects import Info
from hpcfs.remotes.s3.parts import Limits, Part, changed, merged
from hpcfs.remotes.s3.translate import s3_code

_WHOLE = "this change can't be made on the server: the whole file must be sent"


class Patcher:
    """Changes large objects of one bucket."""

    def __init__(self, bucket: Bucket, limits: Limits) -> None:
        self._bucket, self._limits = bucket, limits

    def plan(self, old: Info, request: UploadRequest) -> list[Part] | None:
        """Return the parts of the new object, or None where the whole file should be sent."""
        if self._bucket.server.copies_parts is False or not old.etag:
            return None
        if old.size <= self._limits.single_put or request.size <= self._limits.single_put:
            return None
        base_size = min(request.base_size, old.size)
        parts = changed(request.size, base_size, request.ranges, self._limits)
        if parts is None or any(
            part.length > self._limits.buffered_part for part in parts if not part.copied
        ):
            return None
        if request.whole and sum(part.length for part in parts if part.copied) * 2 < request.size:
            return None
        return parts

    async def upload(
        self,
        target: NewObject,
        old: Info,
        request: UploadRequest,
        parts: Sequence[Part],
        source: UploadSource,
        report: ReportProgress,
    ) -> Info:
        """The object as it is then. Raises Conflict, and NotSupported where the server does not
        copy parts; nothing was changed then."""
        progress = TransferProgress(report)
        upload = await Multipart.begin(self._bucket, target)
        filler = _Filler(self._bucket, old, request, source)

        async def copy(part: Part) -> None:
            await upload.copy(part, old)
            progress.add(part.length)

        async def send(part: Part) -> None:
            async with self._bucket.sending(part.length):
                await upload.send(part, await filler.body(part), progress)
            progress.add(part.length)

        copied = [part for part in parts if part.copied]
        try:
            await self._copy_all(upload, copied, copy)
            limit = self._limits.parts_in_flight
            await each([part for part in parts if not part.copied], send, limit)
            return await upload.complete(request.size, len(parts))
        except Changed as error:
            await asyncio.shield(upload.abort())
            raise Conflict(error.message) from error
        except BaseException:
            await asyncio.shield(upload.abort())
            raise

    async def _copy_all(
        self, upload: Multipart, parts: Sequence[Part], copy: Callable[[Part], Awaitable[None]]
    ) -> None:
        """First of all, since not every server can: some take it for sending an empty part."""
        server = self._bucket.server
        try:
            await each(parts, copy, self._limits.parts_in_flight)
            server.copies_parts = await upload.are_whole(parts)
        except NotSupported:
            server.copies_parts = False
        except RemoteFailure as error:  # this object's own: encrypted, archived, ...
            if s3_code(error) in ("InvalidRequest", "InvalidArgument"):
                raise NotSupported(_WHOLE) from error
            raise
        if not server.copies_parts:
            raise NotSupported(_WHOLE)


class _Filler:
    """The bytes of parts that are sent."""

    def __init__(
        self, bucket: Bucket, old: Info, request: UploadRequest, source: UploadSource
    ) -> None:
        self._bucket, self._old, self._request, self._source = bucket, old, request, source
        self._base_size = min(request.base_size, old.size)
        written = ((start, start + length) for start, length in request.ranges)
        self._written = merged(written, request.size)

    async def body(self, part: Part) -> bytes:
        if self._request.whole:
            return await read(self._source, part.offset, part.length)
        body = bytearray(part.length)
        for start, end, is_written in self._pieces(part.offset, part.end):
            at = start - part.offset
            if is_written:
                body[at : at + end - start] = await read(self._source, start, end - start)
            elif start < self._base_size:
                end = min(end, self._base_size)
                data = await self._bucket.get(
                    self._old.key, self._old.version, start, end - start, urgent=False
                )
                body[at : at + end - start] = data
        return bytes(body)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """Yield what was written and what was not between the two, in turn."""
        index = max(0, bisect_right(self._written, (start, start)) - 1)
        while start < stop:
            begin, end = self._written[index] if index < len(self._written) else (stop, stop)
            if end <= start:
                index += 1
            elif begin > start:
                yield start, min(begin, stop), False
                start = min(begin, stop)
            else:
                yield start, min(end, stop), True
                start = min(end, stop)
