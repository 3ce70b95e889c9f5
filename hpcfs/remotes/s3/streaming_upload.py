"""Files that are sent while they are still being written: multipart uploads that begin before the
size is known.

Pieces come in any order. A part of several of them is sent when the last one is there, read again
from the source: so memory stays bounded, and a piece counts as sent although it may still be
only there. Parts that were not sent, or were written again, are sent when the file is complete.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from hpcfs.model.errors import Changed, InvalidRequest, NotSupported, PiecesLost, RemoteFailure
from hpcfs.remotes.base import ReportProgress, UploadSource, no_report
from hpcfs.remotes.s3.bucket import Bucket
from hpcfs.remotes.s3.multipart import Multipart, NewObject, TransferProgress, each
from hpcfs.remotes.s3.objects import Info
from hpcfs.remotes.s3.parts import Growing, Limits, Part

log = logging.getLogger(__name__)
MakeObject = Callable[[], Awaitable[NewObject]]


@dataclass(eq=False)
class S3StreamingUpload:
    """The streaming upload of one file. `upload` is begun with its first part."""

    path: bytes
    upload: Multipart | None = None
    gathered: dict[int, set[int]] = field(default_factory=dict)
    """Of parts that are not sent yet, the offsets of the pieces that are there."""
    beginning: asyncio.Lock = field(default_factory=asyncio.Lock)
    under_way: set[asyncio.Task[None]] = field(default_factory=set)

    async def at_rest(self) -> None:
        """Wait until no part is being sent."""
        while self.under_way:
            await asyncio.wait(self.under_way)


class S3StreamingUploads:
    """The streaming uploads of one namespace, by the caller's handle."""

    def __init__(self, bucket: Bucket, limits: Limits) -> None:
        self._bucket, self._limits = bucket, limits
        self._growing = Growing(limits.upload_part, limits.parts_per_step)
        self._streams: dict[int, S3StreamingUpload] = {}

    def expect(self, handle: int, path: bytes) -> None:
        """Note a new file, which may be sent while it is written, or not."""
        self._streams[handle] = S3StreamingUpload(path)

    async def send(
        self,
        handle: int,
        path: bytes,
        offset: int,
        length: int,
        source: UploadSource,
        make_target: MakeObject,
    ) -> None:
        """Take a piece: send its part once all pieces of it are there. Raises PiecesLost where the
        file was renamed."""
        unit = self._limits.upload_part
        if offset % unit or length != unit or offset < 0:
            raise InvalidRequest(f"{length} bytes at {offset} are no piece of {unit}")
        stream = self._streams.setdefault(handle, S3StreamingUpload(path))
        if stream.path != path:
            raise PiecesLost("the file was renamed while it was sent: it is sent again at the end")
        part = self._growing.part(self._growing.number_at(offset))
        pieces = stream.gathered.setdefault(part.number, set())
        pieces.add(offset)
        if len(pieces) * unit < part.length:
            return
        sending = asyncio.create_task(self._send_part(stream, part, source, make_target))
        stream.under_way.add(sending)
        sending.add_done_callback(stream.under_way.discard)
        try:
            await sending
        except BaseException:
            pieces.discard(offset)  # this one counts as not sent, and its part is not
            sending.cancel()
            raise
        stream.gathered.pop(part.number, None)

    async def _send_part(
        self, stream: S3StreamingUpload, part: Part, source: UploadSource, make_target: MakeObject
    ) -> None:
        async with stream.beginning:
            if stream.upload is None:
                stream.upload = await Multipart.begin(self._bucket, await make_target())
        await stream.upload.send_from(
            part, source, self._limits.buffered_part, TransferProgress(no_report)
        )

    async def finish(
        self,
        handle: int,
        target: NewObject,
        path: bytes,
        ranges: Sequence[tuple[int, int]],
        source: UploadSource,
        report: ReportProgress,
    ) -> Info | None:
        """The object, with the metadata of the time when it was begun. None where nothing of use
        was sent, and the whole file must be, which the source still holds.

        Raises PiecesLost where this process knows nothing of the handle.
        """
        stream = self._streams.get(handle)
        if stream is None:
            raise PiecesLost("what was sent of the file is gone: it must be sent again")
        await stream.at_rest()
        upload = stream.upload
        if upload is None:
            return None
        if stream.path != path or source.size <= self._limits.upload_part:
            stream.upload = None
            await upload.abort()
            return None
        upload.target = NewObject(
            upload.target.key, upload.target.metadata, upload.target.headers, target.base
        )
        progress = TransferProgress(report)
        parts = list(self._growing.parts(source.size))
        again = self._touched(ranges, source.size)

        async def send(part: Part) -> None:
            await upload.send_from(part, source, self._limits.buffered_part, progress)
            progress.add(part.length)

        missing = [part for part in parts if part.number in again or not upload.has(part)]
        try:
            await each(missing, send, self._limits.parts_in_flight)
            found = await upload.complete(source.size, len(parts))
        except (Changed, NotSupported, RemoteFailure) as error:
            # Gone, or the server does not take a part again (rclone's), or wants equal ones (R2).
            log.info("the parts that were sent are of no use: %s", error.message)
            stream.upload = None
            await upload.abort()
            return None
        del self._streams[handle]
        return found

    def _touched(self, ranges: Sequence[tuple[int, int]], size: int) -> set[int]:
        """The numbers of the parts in which something lies that was written after it was sent."""
        at = self._growing.number_at
        return {
            number
            for offset, length in ranges
            if length > 0 and offset < size
            for number in range(at(offset), at(min(offset + length, size) - 1) + 1)
        }

    def forget(self, handle: int) -> None:
        """The file was uploaded in another way."""
        self._streams.pop(handle, None)

    async def give_up(self, handle: int) -> None:
        """Abort the upload of a handle, if there is one."""
        stream = self._streams.pop(handle, None)
        if stream is None:
            return
        await stream.at_rest()
        if stream.upload is not None:
            await stream.upload.abort()

    async def close(self) -> None:
        """Abort all uploads."""
        await asyncio.gather(*(self.give_up(handle) for handle in list(self._streams)))
