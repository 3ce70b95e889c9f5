"""Reading ranges of one version of a file through handles that stay open on the server.

The version is checked by an fstat that follows the reads on the same handle: servers treat requests
about one file in order, so an fstat that still shows the version vouches for the bytes before it,
and costs no round trip of its own. A handle outlives renames and removals of its file's name.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import asyncssh
from asyncssh import SFTPAttrs
from asyncssh.constants import FXF_READ

from hpcfs.model.entries import NO_HANDLE
from hpcfs.model.errors import Changed
from hpcfs.remotes.sftp.attrs import version_of
from hpcfs.remotes.sftp.flow import Flow
from hpcfs.remotes.sftp.path import SftpPath
from hpcfs.remotes.sftp.requests import Chunks, Requests
from hpcfs.remotes.sftp.session import SftpSession, all_of, give_up
from hpcfs.remotes.sftp.working import Work, working

log = logging.getLogger(__name__)

MAX_OPEN_HANDLES = 128
"""Per namespace; less where the server grants few (handles.py). A handle closed for want of room is
opened again by the next fetch."""


@dataclass(eq=False)
class ReadHandle:
    """A remote handle, open or being opened. It is closed once dropped and not in use."""

    place: SftpPath
    opening: asyncio.Task[bytes]
    users: int = 0
    dropped: bool = False

    @property
    def session(self) -> SftpSession:
        """The session that the handle belongs to."""
        return self.place.session


class ReadHandles:
    """The remote handles by the reader's handle, least recently used first."""

    def __init__(self, limit: int = MAX_OPEN_HANDLES) -> None:
        self._limit = limit
        self._files: OrderedDict[int, ReadHandle] = OrderedDict()

    @asynccontextmanager
    async def using(self, place: SftpPath, handle: int) -> AsyncIterator[bytes]:
        """Yield the remote handle for `handle`, opened at `place` by the first to ask; for
        NO_HANDLE, one for this use alone."""
        if handle == NO_HANDLE:
            async with self._held(
                handle, ReadHandle(place, _opening(place), dropped=True)
            ) as remote:
                yield remote
            return
        file = self._files.get(handle)
        if file is None or file.session is not place.session:
            file = self._open(place, handle)
        self._files.move_to_end(handle)
        async with self._held(handle, file) as remote:
            yield remote

    @asynccontextmanager
    async def if_open(
        self, session: SftpSession, handle: int
    ) -> AsyncIterator[tuple[SftpPath, bytes] | None]:
        """Yield where the file was opened and its remote handle; None where this connection has
        none."""
        file = self._files.get(handle)
        if file is None or file.session is not session:
            yield None
            return
        async with self._held(handle, file) as remote:
            yield file.place, remote

    def release(self, handle: int) -> None:
        """Close the reader's handle once it is not in use."""
        file = self._files.pop(handle, None)
        if file is not None:
            self._drop(file)

    def _open(self, place: SftpPath, handle: int) -> ReadHandle:
        file = self._files[handle] = ReadHandle(place, _opening(place))
        while len(self._files) > self._limit:
            self._drop(self._files.popitem(last=False)[1])
        return file

    @asynccontextmanager
    async def _held(self, handle: int, file: ReadHandle) -> AsyncIterator[bytes]:
        file.users += 1
        file.session.handles.wake(file)
        try:
            yield await asyncio.shield(file.opening)
        finally:
            file.users -= 1
            if file.opening.done() and file.opening.exception() is not None:
                if self._files.get(handle) is file:
                    del self._files[handle]
            elif file.dropped and not file.users:
                self._close(file)
            elif not file.users and file.opening.done():
                give_up = partial(self._give_up, handle, file)
                file.session.handles.rest(file, file.place.full, give_up)

    def _give_up(self, handle: int, file: ReadHandle) -> None:
        """The server grants few handles, and another is wanted."""
        if self._files.get(handle) is file:
            del self._files[handle]
        self._drop(file)

    def _drop(self, file: ReadHandle) -> None:
        file.dropped = True
        if not file.users:
            self._close(file)

    def _close(self, file: ReadHandle) -> None:
        """Close the handle once it is open: nobody waits for a reader's close."""
        file.session.handles.wake(file)
        file.opening.add_done_callback(partial(_close_remote, file.session.bulk))


def _opening(place: SftpPath) -> asyncio.Task[bytes]:
    opening = asyncio.ensure_future(place.session.bulk.open(place.full, FXF_READ, SFTPAttrs()))
    opening.add_done_callback(lambda task: task.cancelled() or task.exception())
    return opening


def _close_remote(bulk: Requests, opening: asyncio.Task[bytes]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        bulk.close_soon(opening.result())


async def read_range(
    place: SftpPath,
    handle: bytes,
    version: bytes,
    offset: int,
    length: int,
    *,
    growing: bool = False,
    urgent: bool = False,
) -> list[bytes]:
    """Return exactly `length` bytes of `version`, in the chunks in which they came.

    Raises Changed when the handle's file has another version, or ends too early; with `growing` a
    file that is longer by now is no change.
    """
    with place.asking():
        try:
            with working(place.session.answers) as work:
                reading = _Reading(place, handle, offset, length, work)
                got, looks = await reading.pieces(urgent=urgent)
                data, continued = await reading.completed(got)
                if continued:
                    looks = [await place.session.bulk.fstat(handle, 0)]
        except asyncssh.SFTPEOFError:
            raise Changed(f"{place} is shorter than it was") from None
    for attrs in looks:
        if version_of(attrs, place.full) != version and not (growing and has_grown(attrs, version)):
            raise Changed(f"{place} was changed meanwhile")
    return data


@dataclass(frozen=True)
class _Reading:
    """One range of a file."""

    place: SftpPath
    handle: bytes
    offset: int
    length: int
    work: Work

    async def pieces(self, *, urgent: bool) -> tuple[list[Chunks], list[SFTPAttrs]]:
        """Return what the pieces of the range brought, and the file's attributes after them, as
        seen on each channel that brought some: only there do they follow the reads."""
        session = self.place.session
        flow, size, end = session.reading, session.read_bytes, self.offset + self.length
        turn = flow.turn()
        asked: list[asyncio.Future[Any]] = []
        channels: dict[Requests, None] = {}
        try:
            for start in range(self.offset, end, size):
                wanted = min(size, end - start)
                await flow.enter(wanted, turn, urgent=urgent)
                channel = session.reader()
                channels[channel] = None
                asked.append(self._piece(channel, flow, start, wanted))
            pieces = len(asked)
            looking = list(channels) or [session.bulk]  # a range of no bytes asks for the version
            asked += [asyncio.ensure_future(channel.fstat(self.handle, 0)) for channel in looking]
        except BaseException:
            await give_up(asked)
            raise
        got = await all_of(asked)
        return got[:pieces], got[pieces:]

    def _piece(
        self, channel: Requests, flow: Flow, start: int, wanted: int
    ) -> asyncio.Future[Chunks]:
        """Ask for a piece that was admitted: it leaves when it is here, or when nobody wants it any
        more."""
        try:
            piece = channel.read_piece(self.handle, start, wanted)
        except BaseException:
            flow.leave(wanted)
            raise
        piece.add_done_callback(partial(self._landed, flow, wanted, _now(), flow.under_way))
        return piece

    def _landed(
        self, flow: Flow, size: int, asked_at: float, beside: int, piece: asyncio.Future[Chunks]
    ) -> None:
        if not piece.cancelled() and piece.exception() is None:
            self.work.moved()
            flow.arrived(size, _now() - asked_at, beside)
        flow.leave(size)

    async def completed(self, pieces: list[Chunks]) -> tuple[list[bytes], bool]:
        """The pieces in order, and whether some had to be asked for again because they came
        short."""
        chunks: list[bytes] = []
        continued = False
        start, end = self.offset, self.offset + self.length
        for piece in pieces:
            wanted = min(self.place.session.read_bytes, end - start)
            got = sum(map(len, piece))
            chunks += piece
            while got < wanted:
                continued = True
                more = await self.place.session.bulk.read_piece(
                    self.handle, start + got, wanted - got
                )
                if not more:
                    raise Changed(f"{self.place} is shorter than it was")
                chunks += more
                got += sum(map(len, more))
            start += wanted
        return chunks, continued


def _now() -> float:
    return asyncio.get_running_loop().time()


def has_grown(attrs: SFTPAttrs, version: bytes) -> bool:
    """Return whether the file is longer now than `version` (see attrs.version_of) says."""
    return (attrs.size or 0) > int(version.partition(b":")[0])
