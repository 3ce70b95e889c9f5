"""Bringing a file's dirty ranges to the server, and making new files.

The order is what makes an upload safe to repeat: cut to what is still meant to be there, write the
ranges, set the size, the attributes, fsync, look, close. Each step is idempotent, and what the
server says at the end (fstat, close) decides whether the upload counts.
"""

from __future__ import annotations

import asyncio
import logging
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial

from asyncssh import SFTPAttrs, SFTPOpUnsupported, SFTPPermissionDenied
from asyncssh.constants import FXF_CREAT, FXF_EXCL, FXF_WRITE

from hpcfs.remotes.base import ReportProgress, Source, checked_size
from hpcfs.remotes.sftp.attrs import full_mode, owner_to_set, rest_to_set
from hpcfs.remotes.sftp.place import Place, explain_file, explain_full, explain_new
from hpcfs.remotes.sftp.session import SftpSession, together
from hpcfs.transfer.messages import (
    Attributes,
    Changed,
    Entry,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    RemoteError,
    RemoteFailure,
    Upload,
)

log = logging.getLogger(__name__)

Ranges = list[tuple[int, int]]


async def create(place: Place, mode: int) -> Entry:
    """A new empty file with exactly these permissions, whatever the remote umask."""
    handle = await _open(place, FXF_WRITE | FXF_CREAT | FXF_EXCL, mode)
    async with _closing(place, handle):
        attrs = await _set_mode(place, handle, mode)
    return place.entry_of(attrs)


async def upload(place: Place, request: Upload, source: Source, report: ReportProgress) -> Entry:
    """Raises Changed when the remote lost bytes that are still meant to be there."""
    if request.size < 0 or request.base_size < 0:
        raise InvalidRequest("a size can't be negative")
    handle = await _open_for_upload(place, request.mode)
    async with _closing(place, handle):
        await _write_content(place, handle, request, source, report)
        attrs = await _finish(place, handle, request)
    entry = place.entry_of(attrs)
    if entry.size != request.size:
        raise RemoteFailure(
            f"{place} has {entry.size} bytes after the upload instead of {request.size}: "
            "something else writes to it"
        )
    return entry


# --- handles ------------------------------------------------------------------------------------


async def _open(place: Place, flags: int, mode: int | None = None) -> bytes:
    attrs = SFTPAttrs() if mode is None else SFTPAttrs(permissions=mode & 0o7777)
    bulk = place.session.bulk
    try:
        with place.asking():
            return await bulk.kept(bulk.open(place.full, flags, attrs))
    except RemoteError as error:
        explain = explain_new if flags & FXF_EXCL else explain_file
        raise await explain(place, error) from error


async def _close_quietly(place: Place, handle: bytes) -> None:
    """After a failure that is being reported already."""
    try:
        with place.asking():
            await place.session.bulk.close(handle)
    except RemoteError as error:
        log.debug("closing %s after a failure failed too: %s", place, error.message)


@asynccontextmanager
async def _closing(place: Place, handle: bytes) -> AsyncIterator[None]:
    """Closes in any case; a failing close counts where all else went well (that is when network
    file systems report what they could not write)."""
    try:
        yield
    except BaseException:
        await _close_quietly(place, handle)
        raise
    with place.asking():
        await place.session.bulk.close(handle)


async def _open_for_upload(place: Place, mode: int) -> bytes:
    """The file, made if need be; one that its owner made read-only is opened all the same."""
    try:
        return await _open(place, FXF_WRITE)
    except NotFound:
        handle = await _open(place, FXF_WRITE | FXF_CREAT | FXF_EXCL, mode)
    except PermissionDenied as error:
        return await _open_read_only(place, error)
    try:
        await _set_mode(place, handle, mode)
    except BaseException:
        await _close_quietly(place, handle)
        raise
    return handle


async def _open_read_only(place: Place, refusal: PermissionDenied) -> bytes:
    """`cp -a` of a read-only file and git's objects write through a descriptor that is older than
    the mode. Here the descriptor is younger, so the owner may write for as long as opening takes.
    """
    attrs = await place.attrs()
    mode = full_mode(attrs)
    if not stat.S_ISREG(mode) or mode & stat.S_IWUSR:
        raise refusal
    read_only = SFTPAttrs(permissions=stat.S_IMODE(mode))
    writable = SFTPAttrs(permissions=stat.S_IMODE(mode) | stat.S_IWUSR)
    with place.asking():
        try:
            await place.session.bulk.setstat(place.full, writable)
        except SFTPPermissionDenied:
            raise refusal from None
        try:
            return await _open(place, FXF_WRITE)
        finally:
            await asyncio.shield(place.session.bulk.setstat(place.full, read_only))


async def _set_mode(place: Place, handle: bytes, mode: int) -> SFTPAttrs:
    bulk = place.session.bulk
    wanted = SFTPAttrs(permissions=mode & 0o7777)
    with place.asking():
        attrs: SFTPAttrs
        _, attrs = await together(bulk.fsetstat(handle, wanted), bulk.fstat(handle, 0))
    return attrs


# --- content ------------------------------------------------------------------------------------


async def _write_content(
    place: Place, handle: bytes, request: Upload, source: Source, report: ReportProgress
) -> None:
    bulk = place.session.bulk
    with place.asking():
        attrs = await bulk.fstat(handle, 0)
    size = checked_size(attrs.size, place.full)
    if not _covered(size, min(request.base_size, request.size), request.ranges):
        raise Changed(f"{place} was cut to {size} bytes meanwhile, and what it had is not here")
    try:
        if size > request.base_size:
            size = request.base_size
            with place.asking():
                await bulk.fsetstat(handle, SFTPAttrs(size=size))
        await _write_ranges(place, handle, request.ranges, source, report)
        size = max([size, *(start + length for start, length in request.ranges)])
        if size != request.size:
            with place.asking():
                await bulk.fsetstat(handle, SFTPAttrs(size=request.size))
    except RemoteError as error:
        raise await explain_full(place, error) from error


def _covered(start: int, end: int, ranges: Ranges) -> bool:
    """Whether the ranges bring every byte from `start` to `end`."""
    for offset, length in sorted(ranges):
        if offset <= start:
            start = max(start, offset + length)
    return start >= end


async def _write_ranges(
    place: Place, handle: bytes, ranges: Ranges, source: Source, report: ReportProgress
) -> None:
    """All pieces pipelined. They are read inline: the cache file was written a moment ago, so its
    bytes are in the page cache, and a thread per piece would cost more than the copy."""
    session = place.session
    turn = session.writing.turn()
    done = 0

    async def write(offset: int, data: bytes) -> None:
        nonlocal done
        await session.bulk.write(handle, offset, data)
        done += len(data)
        report(done)

    with place.asking():
        try:
            async with asyncio.TaskGroup() as group:
                for offset, length in _pieces(ranges, session.write_bytes):
                    data = source.read(offset, length)
                    await session.writing.enter(len(data), turn)
                    task = group.create_task(write(offset, data))
                    task.add_done_callback(partial(_leave, session, len(data)))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None


def _leave(session: SftpSession, size: int, _: asyncio.Task[None]) -> None:
    session.writing.leave(size)


def _pieces(ranges: Ranges, limit: int) -> Iterator[tuple[int, int]]:
    for offset, length in ranges:
        for start in range(offset, offset + length, limit):
            yield start, min(limit, offset + length - start)


async def _finish(place: Place, handle: bytes, request: Upload) -> SFTPAttrs:
    """Attributes, fsync, and what the file is like then."""
    bulk = place.session.bulk
    await _set_by_handle(place, handle, request.attributes)
    with place.asking():
        if request.sync:
            try:
                await bulk.fsync(handle)
            except SFTPOpUnsupported:
                log.debug("%s has no fsync: the bytes are with the server", place.session.shown)
        return await bulk.fstat(handle, 0)


async def _set_by_handle(place: Place, handle: bytes, wanted: Attributes) -> None:
    if not wanted:
        return
    bulk = place.session.bulk
    with place.asking():
        now = await bulk.fstat(handle, 0)
        owner = owner_to_set(wanted, now, place.session.owners)
        if owner is not None:
            await bulk.fsetstat(handle, owner)
        rest = rest_to_set(wanted, now)
        if rest is not None:
            await bulk.fsetstat(handle, rest)
