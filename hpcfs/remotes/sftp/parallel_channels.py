"""Several ways to one file: what is large is written over several channels.

OpenSSH lets a sender have 2 MiB under way on a channel (CHAN_SES_WINDOW_DEFAULT in its channels.h),
which is 100 MB/s at 20 ms and 20 at 100, whatever the link carries. So a large upload opens its
file once more on each of a few further channels. A name may have become another file's by then:
before anything is written the first handle gives the file a time that nobody else does, and a
handle that does not show it is not used.

What is written over old content goes one way: an attempt that breaks off must leave a beginning of
it (remotes/sftp/upload_resume.py), and channels don't keep to one order.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass

from asyncssh import SFTPAttrs
from asyncssh.constants import FXF_WRITE

from hpcfs.model.errors import RemoteError
from hpcfs.remotes.sftp.place import Place
from hpcfs.remotes.sftp.requests import Requests

log = logging.getLogger(__name__)

WIDE_BYTES = 8 * 1024 * 1024
"""From this size on it is worth the three round trips."""


@dataclass(eq=False)
class Way:
    """A handle on a channel, and how many bytes are under way on it."""

    requests: Requests
    handle: bytes
    under_way: int = 0

    async def write(self, offset: int, data: bytes) -> None:
        self.under_way += len(data)
        try:
            await self.requests.write(self.handle, offset, data)
        finally:
            self.under_way -= len(data)


class Ways:
    """Of one file that is open for writing; `first` is the handle that completes it."""

    def __init__(self, place: Place, first: bytes) -> None:
        self._place = place
        self._first = Way(place.session.bulk, first)
        self._others: list[Way] = []
        self._widening: asyncio.Task[None] | None = None

    async def for_writing(self, length: int) -> list[Way]:
        """Those for that many bytes. Nothing may be written before the first answer to this."""
        if length >= WIDE_BYTES and self._widening is None:
            self._widening = asyncio.create_task(self._widen())
        if self._widening is not None:
            await asyncio.shield(self._widening)
        return [self._first, *self._others]

    async def _widen(self) -> None:
        channels = await self._place.session.more_channels()
        if not channels:
            return
        mark = 1 + secrets.randbelow(2**30)
        try:
            with self._place.asking():
                marked = SFTPAttrs(atime=mark, mtime=mark)
                await self._first.requests.fsetstat(self._first.handle, marked)
                await asyncio.gather(*(self._add(channel, mark) for channel in channels))
        except RemoteError as error:
            log.debug("%s is written over one channel: %s", self._place, error.message)

    async def _add(self, channel: Requests, mark: int) -> None:
        opening = channel.open_spare(self._place.full, FXF_WRITE)
        way = Way(channel, await channel.kept(opening))
        if (await channel.fstat(way.handle, 0)).mtime == mark:
            self._others.append(way)
        else:
            channel.close_soon(way.handle)

    async def close_others(self) -> None:
        """Everything was written: what a close reports counts. Raises what the server says."""
        others, self._others = self._others, []
        await asyncio.gather(*(way.requests.close(way.handle) for way in others))

    async def give_up(self) -> None:
        """After a failure that is being reported already; returns once the server is through with
        what was sent on the other handles."""
        others, self._others = self._others, []
        closing = [way.requests.close(way.handle) for way in others if not way.requests.ended]
        for failed in await asyncio.gather(*closing, return_exceptions=True):
            if isinstance(failed, Exception):
                log.debug("after a failure of %s, another one: %s", self._place, failed)

    def close_soon(self) -> None:
        """Nobody waits: the file is given up."""
        others, self._others = self._others, []
        for way in others:
            way.requests.close_soon(way.handle)
