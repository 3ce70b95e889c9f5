"""Uploads in the cheapest way that there is: complete a streaming upload, change a large object on
the server, or send the whole file."""

from __future__ import annotations

import mimetypes
import stat
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace as with_changes
from typing import Any

from hpcfs.model import paths
from hpcfs.model.entries import NO_HANDLE, Attributes
from hpcfs.model.errors import Conflict, NotSupported
from hpcfs.model.uploads import UploadPieceRequest, UploadRequest
from hpcfs.remotes.base import ReportProgress, UploadSource
from hpcfs.remotes.s3.bucket import Bucket
from hpcfs.remotes.s3.entries import Entries
from hpcfs.remotes.s3.metadata import PERMISSIONS, Metadata, encode
from hpcfs.remotes.s3.multipart import NewObject, check_base
from hpcfs.remotes.s3.objects import Info, Summary, access_of, without_access
from hpcfs.remotes.s3.parts import Limits
from hpcfs.remotes.s3.patch import Patcher
from hpcfs.remotes.s3.paths import S3Lookup
from hpcfs.remotes.s3.streaming_upload import S3StreamingUploads
from hpcfs.remotes.s3.transfer import Transfer


class S3Uploads:
    """The uploads of one namespace. `streams` are the files that are sent while they are
    written."""

    def __init__(
        self, bucket: Bucket, transfer: Transfer, entries: Entries, limits: Limits
    ) -> None:
        self._bucket, self._transfer, self._entries = bucket, transfer, entries
        self._patcher = Patcher(bucket, limits)
        self.streams = S3StreamingUploads(bucket, limits)

    async def upload(
        self, request: UploadRequest, look: S3Lookup, source: UploadSource, report: ReportProgress
    ) -> tuple[Summary, Info]:
        """Upload a file; return the object as it is then, with its metadata.

        Raises Conflict only where what is there is not what this upload makes: one whose answer was
        lost is asked for again.
        """
        old, headers = await self._kept_of(look, replaced=request.replace)
        if request.replace:  # another file: the old one's went with it
            old = with_changes(old, xattrs=())
        mode = stat.S_IFREG | (request.mode & PERMISSIONS)
        metadata = with_changes(old, mtime_ns=time.time_ns()).changed(request.attributes, mode)
        target = NewObject(look.place.key, metadata, headers, request.base_version)
        try:
            stored, metadata = await self._send(request, target, look, source, report)
        except Conflict:
            found = await self._bucket.head(target.key)
            if found is None or not await self._transfer.holds(found, source, metadata, request):
                raise
            stored, metadata = await self._with_metadata(found, target, request)
        self._transfer.tags_and_acls.has(target.key, access_of(headers))
        return stored, info_of_stored(stored, metadata, headers)

    async def upload_piece(
        self,
        request: UploadPieceRequest,
        look: Callable[[], Awaitable[S3Lookup]],
        source: UploadSource,
    ) -> None:
        """Send a piece of a file that is still being written. Raises PiecesLost and
        NotSupported."""

        async def target() -> NewObject:
            """Without times, which are known at the end."""
            found = await look()
            old, headers = await self._kept_of(found)
            mode = stat.S_IFREG | (request.mode & PERMISSIONS)
            metadata = with_changes(old, mtime_ns=None, atime_ns=None).changed(Attributes(), mode)
            return NewObject(found.place.key, metadata, headers, request.base_version)

        await self.streams.send(
            request.handle, request.path, request.offset, request.length, source, target
        )

    async def _send(
        self,
        request: UploadRequest,
        target: NewObject,
        look: S3Lookup,
        source: UploadSource,
        report: ReportProgress,
    ) -> tuple[Summary, Metadata]:
        """Send the object; return it as it is then, and its metadata."""
        if request.handle != NO_HANDLE:
            sent = await self.streams.finish(
                request.handle, target, request.path, request.ranges, source, report
            )
            if sent is not None:
                return await self._with_metadata(sent, target, request)
        check_base(target.key, look.file, target.base)
        parts = None
        if target.base and look.file is not None:
            parts = self._patcher.plan(look.file, request)
        if parts is not None and look.file is not None:
            try:
                stored: Summary = await self._patcher.upload(
                    target, look.file, request, parts, source, report
                )
            except NotSupported:
                if not request.whole:
                    raise
            else:
                return stored, target.metadata
        if not request.whole:
            raise NotSupported("this change can't be made on the server: send the whole file")
        whole = await self._transfer.upload(target, source, report)
        self.streams.forget(request.handle)
        return whole, target.metadata

    async def _with_metadata(
        self, found: Info, target: NewObject, request: UploadRequest
    ) -> tuple[Summary, Metadata]:
        """Give the object its metadata, where that was made before the file was complete. A time
        that is only that of the last write is not worth a copy: then the one of the server's
        counts."""
        wanted = target.metadata
        if not request.times_set:
            wanted = with_changes(
                wanted, mtime_ns=found.metadata.mtime_ns, atime_ns=found.metadata.atime_ns
            )
        if encode(wanted) == encode(found.metadata):
            return found, found.metadata
        return await self._transfer.copy(found, target.key, target.metadata), target.metadata

    async def _kept_of(
        self, look: S3Lookup, *, replaced: bool = False
    ) -> tuple[Metadata, Mapping[str, Any]]:
        """Return the metadata and headers that the object keeps when it is written anew. Another
        file that is renamed over it (`replaced`) does not get who may read it: that file may be
        more private."""
        guessed = _guessed_headers(look.place.path)
        if look.file is None:
            return self._entries.fresh(), guessed
        tags_and_acls = self._transfer.tags_and_acls
        if replaced:
            found = {**without_access(look.file.headers), **await tags_and_acls.tags(look.file)}
        else:
            found = await tags_and_acls.of(look.file)
        return look.file.metadata, found if look.file.headers else {**guessed, **found}


def info_of_stored(stored: Summary, metadata: Metadata, headers: Mapping[str, Any]) -> Info:
    """Return what a HEAD of the object just stored would say."""
    return Info(
        stored.key,
        stored.size,
        stored.etag,
        stored.modified_ns,
        metadata=metadata,
        headers=headers,
    )


def _guessed_headers(path: bytes) -> dict[str, str]:
    """Guess the content type as the AWS CLI does, so that browsers show what they can."""
    guess, _ = mimetypes.guess_type(paths.name(path).decode(errors="replace"))
    return {"ContentType": guess} if guess else {}
