"""Brings bytes and attributes to a file that is open on the server, in few round trips.

SFTP servers treat the requests about one file in the order in which they come, so nothing has to
wait for the answer to what goes before it: what is small travels with everything that completes
the file (its size, attributes, fsync, a look, the close) in one flight. A large file is bounded by
what may be under way, and completed once its last byte is there: only a small file can for a moment
have its final size and time without all of its bytes, and is touched again when that happens.

Each step can be repeated, and what the server says at the end (fstat, close) decides whether the
upload counts. Whatever happens, the handle is closed, and nothing is written after this ended.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from asyncssh import SFTPAttrs, SFTPOpUnsupported, SFTPPermissionDenied

from hpcfs.model.errors import RemoteError, Unreachable
from hpcfs.model.uploads import UploadRequest
from hpcfs.remotes.base import ReportProgress, UploadSource
from hpcfs.remotes.sftp.attrs import needs_present, owner_to_set, rest_to_set
from hpcfs.remotes.sftp.explain import explain_full, explain_size
from hpcfs.remotes.sftp.parallel_channels import ParallelChannels, WriteChannel
from hpcfs.remotes.sftp.path import SftpPath
from hpcfs.remotes.sftp.session import SftpSession
from hpcfs.remotes.sftp.working import Work, working

log = logging.getLogger(__name__)

SMALL_BYTES = 1024 * 1024
"""Up to this, all of it goes in one flight: at 20 ms that is faster up to 400 Mbit/s."""

Ranges = Sequence[tuple[int, int]]
Sent = asyncio.Task[Any]


@dataclass
class WritableFile:
    """A file that is open for writing at `place`, with `size` bytes; `now` is what it was like when
    it was opened or made. `earlier` was sent on the handle and is not answered yet."""

    place: SftpPath
    handle: bytes
    size: int = 0
    now: SFTPAttrs | None = None
    earlier: list[Sent] = field(default_factory=list)
    channels: ParallelChannels = field(init=False)

    def __post_init__(self) -> None:
        self.channels = ParallelChannels(self.place, self.handle)

    @property
    def session(self) -> SftpSession:
        """The session that the handle belongs to."""
        return self.place.session


async def bring(
    target: WritableFile,
    request: UploadRequest,
    source: UploadSource,
    report: ReportProgress,
    *,
    keep: int,
) -> SFTPAttrs:
    """Cut the file to `keep` bytes, write the ranges, complete and close it -> what it is like.

    `request.size` counts, `request.base_size` does not.
    """
    tail_sent = False
    try:
        with target.place.asking():
            if target.now is None and needs_present(request.attributes):
                target.now = await target.session.bulk.fstat(target.handle, 0)
            if is_small(request.ranges):
                pieces = _read_all(target.session, request.ranges, source)
                async with _Room(target.session, sum(len(data) for _, data in pieces)):
                    tail_sent = True
                    writes = _sent([*_cut(target, keep), *_writes(target, pieces)])
                    attrs = await _completed(target, request, keep, writes)
                report(_length(request.ranges))
                return attrs
            cut = _sent(_cut(target, keep))
            is_new = request.base_size == 0
            await write_ranges(target, request.ranges, source, report, wide=is_new)
            await target.channels.close_others()
            tail_sent = True
            return await _completed(target, request, keep, cut)
    except BaseException as error:
        await target.channels.give_up()
        if not tail_sent:
            await close_quietly(target.place, target.handle)
        if isinstance(error, RemoteError):
            if tail_sent:
                await touch(target.place, error)
            explained = await explain_full(target.place, error)
            raise await explain_size(target.place, explained, request.size) from error
        raise


async def _completed(
    target: WritableFile, request: UploadRequest, keep: int, before: list[Sent]
) -> SFTPAttrs:
    sent = [*target.earlier, *before, *_sent(_tail(target, request, keep))]
    with working(target.session.answers):
        results = await answers(sent)
    attrs = results[-2]
    assert isinstance(attrs, SFTPAttrs)
    return attrs


def _sent(requests: Iterable[Coroutine[Any, Any, Any]]) -> list[Sent]:
    """Send the requests in this order, once the event loop comes to it."""
    sent = [asyncio.ensure_future(request) for request in requests]
    for task in sent:
        task.add_done_callback(_observe)
    return sent


def send(request: Coroutine[Any, Any, Any]) -> Sent:
    """Send a request in the background. Its failure is known to whoever waits for it, if anybody
    does."""
    return _sent([request])[0]


def _observe(task: Sent) -> None:
    if not task.cancelled():
        task.exception()


async def answers(sent: Sequence[Sent]) -> list[Any]:
    """Return all results, or raise the failure of the first that failed; in any case once all are
    answered, as the server goes on with what it was sent, whatever becomes of the caller."""
    if not sent:
        return []
    try:
        await asyncio.wait(sent)
    except asyncio.CancelledError:
        await asyncio.wait(sent)
        raise
    return [task.result() for task in sent]


class _Room:
    """Admits a small file, which need not wait for large ones."""

    def __init__(self, session: SftpSession, size: int) -> None:
        self._flow = session.writing
        self._size = size

    async def __aenter__(self) -> None:
        if self._size:
            await self._flow.enter(self._size, self._flow.turn(), urgent=True)

    async def __aexit__(self, *_: object) -> None:
        if self._size:
            self._flow.leave(self._size)


# --- single requests ------------------------------------------------------------------------------


def _cut(target: WritableFile, size: int) -> list[Coroutine[Any, Any, None]]:
    if target.size <= size:
        return []
    return [target.session.bulk.fsetstat(target.handle, SFTPAttrs(size=size))]


def _writes(
    target: WritableFile, pieces: list[tuple[int, bytes]]
) -> list[Coroutine[Any, Any, int]]:
    bulk = target.session.bulk
    return [bulk.write(target.handle, offset, data) for offset, data in pieces]


def _tail(
    target: WritableFile, request: UploadRequest, keep: int
) -> list[Coroutine[Any, Any, Any]]:
    """Return the requests that complete the file: its owner first, since that clears mode bits;
    then its size, mode and times in one request, so that none is there without the others."""
    bulk, handle = target.session.bulk, target.handle
    now = target.now or SFTPAttrs()
    tail: list[Coroutine[Any, Any, Any]] = []
    owner = owner_to_set(request.attributes, now, target.session.owners)
    if owner is not None:
        tail.append(bulk.fsetstat(handle, owner))
    rest = rest_to_set(request.attributes, now)
    size = max([min(target.size, keep), *(start + length for start, length in request.ranges)])
    if size != request.size:
        rest = rest or SFTPAttrs()
        rest.size = request.size
    if rest is not None:
        tail.append(_set_rest(target, rest))
    if request.sync:
        tail.append(_sync(target))
    return [*tail, bulk.fstat(handle, 0), bulk.close(handle)]


async def _set_rest(target: WritableFile, attrs: SFTPAttrs) -> None:
    """Set mode, times and size. Only the owner may set times; on EPERM the server's stay."""
    try:
        await target.session.bulk.fsetstat(target.handle, attrs)
    except SFTPPermissionDenied:
        if attrs.permissions is not None or attrs.size is not None:
            raise
        log.debug("the times of %s are the server's: it is somebody else's file", target.place)


async def _sync(target: WritableFile) -> None:
    try:
        await target.session.bulk.fsync(target.handle)
    except SFTPOpUnsupported:
        log.debug("%s has no fsync: the bytes are with the server", target.place.session.shown)


async def close_quietly(place: SftpPath, handle: bytes) -> None:
    """Close a handle after a failure, which is reported already; returns once the server is through
    with all that was sent on it."""
    await _quietly(place, place.session.bulk.close(handle))


async def wait_quietly(target: WritableFile) -> None:
    """Wait, after a failure, until the server is through with all that was sent on the handle,
    which stays open."""
    await _quietly(target.place, target.session.bulk.fstat(target.handle, 0))


async def _quietly(place: SftpPath, request: Coroutine[Any, Any, Any]) -> None:
    try:
        with place.asking():
            await answers([send(request)])
    except RemoteError as error:
        log.debug("after a failure of %s, another one: %s", place, error.message)


async def touch(place: SftpPath, failure: RemoteError) -> None:
    """Give a file that failed half-way the time of now: it may have the size and time that it was
    meant to have, and must not be taken for that version."""
    if isinstance(failure, Unreachable):
        return
    now = int(time.time())
    touched = SFTPAttrs(atime=now, mtime=now)
    try:
        with place.asking():
            try:
                await place.session.meta.setstat(place.full, touched, follow_symlinks=False)
            except SFTPOpUnsupported:
                await place.session.meta.setstat(place.full, touched)
    except RemoteError as error:
        log.debug("%s could not be touched: %s", place, error.message)


# --- bytes ----------------------------------------------------------------------------------------


def is_small(ranges: Ranges) -> bool:
    """Return whether the ranges go in one flight."""
    return _length(ranges) <= SMALL_BYTES


def _length(ranges: Ranges) -> int:
    return sum(length for _, length in ranges)


def _read_all(
    session: SftpSession, ranges: Ranges, source: UploadSource
) -> list[tuple[int, bytes]]:
    pieces = _pieces(ranges, session.write_bytes)
    return [(offset, source.read(offset, length)) for offset, length in pieces]


async def write_ranges(
    target: WritableFile,
    ranges: Ranges,
    source: UploadSource,
    report: ReportProgress,
    *,
    wide: bool,
) -> None:
    """Write the ranges, all pieces pipelined. They are read inline: a source that was written a
    moment ago is in the page cache, and a thread per piece would cost more than the copy."""
    session = target.session
    channels = await target.channels.for_writing(_length(ranges) if wide else 0)
    turn = session.writing.turn()
    done = 0

    async def write(channel: WriteChannel, offset: int, data: bytes, work: Work) -> None:
        nonlocal done
        await channel.write(offset, data)
        done += len(data)
        work.moved()
        report(done)

    try:
        with working(session.answers) as work:
            async with asyncio.TaskGroup() as group:
                for offset, length in _pieces(ranges, session.write_bytes):
                    data = source.read(offset, length)
                    await session.writing.enter(length, turn)
                    channel = min(channels, key=lambda channel: channel.under_way)
                    task = group.create_task(write(channel, offset, data, work))
                    task.add_done_callback(partial(_leave, session, length))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


def _leave(session: SftpSession, size: int, _: asyncio.Task[None]) -> None:
    session.writing.leave(size)


def _pieces(ranges: Ranges, limit: int) -> Iterator[tuple[int, int]]:
    for offset, length in ranges:
        for start in range(offset, offset + length, limit):
            yield start, min(limit, offset + length - start)
