"""Bringing what programs appended to the end that a file has by then.

The file is opened for appending, so that the server finds its end at each write: what others append
at the same time is not overwritten. The offsets that are sent are those at which the file ended at
the look before, which is right enough for a server that does not heed the flag.

An attempt whose answer was lost is looked for in what was added since: all of it, or its beginning
at the file's end. Bytes that are there are not appended again. The limits: a beginning of fewer
than SURE_BYTES is not recognised, and the same bytes that others appended are taken for it.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from functools import partial

import msgspec
from asyncssh import SFTPAttrs
from asyncssh.constants import FXF_APPEND, FXF_READ, FXF_WRITE

from hpcfs.model.errors import (
    Conflict,
    NotFound,
    NotSupported,
    PermissionDenied,
    RemoteError,
    RemoteFailure,
)
from hpcfs.model.uploads import UploadRequest
from hpcfs.remotes.base import ReportProgress, UploadSource, no_report
from hpcfs.remotes.sftp.explain import explain_full
from hpcfs.remotes.sftp.opening import open_existing
from hpcfs.remotes.sftp.path import SftpPath
from hpcfs.remotes.sftp.session import all_of
from hpcfs.remotes.sftp.upload_resume import UnfinishedUploads, UploadAttempt
from hpcfs.remotes.sftp.write import WritableFile, bring, close_quietly, write_ranges

log = logging.getLogger(__name__)

SURE_BYTES = 256
"""So many of them at the file's end are no coincidence."""
SEARCH_BYTES = 4 * 1024 * 1024
_UNORDERED_WRITE_BYTES = 32 * 1024
"""Servers that grant larger writes (limits@openssh.com) treat them in the order in which they come;
of others that is not known."""


class _Moved:
    """A source whose bytes belong so many bytes further on in the remote's file."""

    def __init__(self, source: UploadSource, by: int) -> None:
        self.size = source.size + by
        self.name = source.name
        self._source = source
        self._by = by

    def read(self, offset: int, length: int) -> bytes:
        return self._source.read(offset - self._by, length)


@dataclass(frozen=True)
class Appended:
    """`request` and `source` as they fit the remote's file: to compare hashes. `is_alone` says that
    nobody else appended meanwhile."""

    attrs: SFTPAttrs
    request: UploadRequest
    source: UploadSource

    @property
    def is_alone(self) -> bool:
        """Whether nobody else appended meanwhile."""
        return self.attrs.size == self.request.size


async def append(
    place: SftpPath,
    request: UploadRequest,
    source: UploadSource,
    report: ReportProgress,
    unfinished: UnfinishedUploads,
) -> Appended:
    """Append what the request brings, where the file ends by now. Raises Conflict where it is
    gone."""
    if place.session.appends:
        try:
            return await _append(place, request, source, report, unfinished, FXF_APPEND)
        except (RemoteFailure, NotSupported) as error:
            log.info("%s could not append, and is told where to write: %s", place, error.message)
        request = msgspec.structs.replace(request, base_version=None)
    appended = await _append(place, request, source, report, unfinished, 0)
    place.session.appends = False
    return appended


async def _append(
    place: SftpPath,
    request: UploadRequest,
    source: UploadSource,
    report: ReportProgress,
    unfinished: UnfinishedUploads,
    flag: int,
) -> Appended:
    attempt = UploadAttempt.of(request, source, checked=False)
    try:
        target = await open_existing(place, attempt, unfinished, FXF_WRITE | flag)
    except NotFound:
        raise Conflict(f"{place} was removed meanwhile") from None
    try:
        begun = 0
        if request.base_version is None:
            begun = await _begun(place, target.size, request, source)
    except BaseException:
        await close_quietly(place, target.handle)
        raise
    start = request.base_size + begun
    moved = _Moved(source, target.size - start)
    left = request.size - start
    fitting = msgspec.structs.replace(
        request,
        size=target.size + left,
        base_size=target.size,
        ranges=[(target.size, left)] if left else [],
    )
    attrs = await _bring(target, fitting, moved, report)
    if (attrs.size or 0) < fitting.size:
        raise RemoteFailure(f"{place} lacks what was appended to it")
    return Appended(attrs, fitting, moved)


async def _bring(
    target: WritableFile, request: UploadRequest, source: UploadSource, report: ReportProgress
) -> SFTPAttrs:
    """Write the pieces in order, as each goes to the end: all but the last one first."""
    place, keep = target.place, target.size
    size = place.session.write_bytes
    done, end = keep, request.size
    try:
        with place.asking():
            while end - done > size:
                several = (end - done - 1) // size * size
                length = several if size > _UNORDERED_WRITE_BYTES else size
                told = partial(_report_more, report, done - keep)
                await write_ranges(target, [(done, length)], source, told, wide=False)
                done += length
    except BaseException as error:
        await close_quietly(place, target.handle)
        if isinstance(error, RemoteError):
            raise await explain_full(place, error) from error
        raise
    last = msgspec.structs.replace(request, ranges=[(done, end - done)] if end > done else [])
    target.size = max(keep, done)
    return await bring(target, last, source, no_report, keep=target.size)


def _report_more(report: ReportProgress, before: int, done: int) -> None:
    report(before + done)


async def _begun(place: SftpPath, size: int, request: UploadRequest, source: UploadSource) -> int:
    """Return how many bytes of what is to be appended an earlier attempt has brought."""
    length = request.size - request.base_size
    first = max(request.base_size, size - SEARCH_BYTES - length)
    if size <= first or length > SEARCH_BYTES:
        return 0
    added = await _read(place, first, size - first)
    ours = source.read(request.base_size, length)
    if added is None:
        return 0
    if ours in added:
        return length
    for begun in range(min(len(ours), len(added)), SURE_BYTES - 1, -1):
        if added.endswith(ours[:SURE_BYTES], 0, len(added) - begun + SURE_BYTES) and (
            added[-begun:] == ours[:begun]
        ):
            return begun
    return 0


async def _read(place: SftpPath, offset: int, length: int) -> bytes | None:
    """Read a range; None where this user may not read it."""
    bulk, size = place.session.bulk, place.session.read_bytes
    try:
        with place.asking():
            handle = await bulk.kept(bulk.open(place.full, FXF_READ, SFTPAttrs()))
            try:
                starts = range(offset, offset + length, size)
                pieces = [
                    asyncio.ensure_future(
                        bulk.read_piece(handle, at, min(size, offset + length - at))
                    )
                    for at in starts
                ]
                return b"".join(b"".join(chunks) for chunks in await all_of(pieces))
            finally:
                bulk.close_soon(handle)
    except PermissionDenied:
        return None
