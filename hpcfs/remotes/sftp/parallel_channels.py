"""Writes a large file over several channels at once.

OpenSSH lets a sender have 2 MiB under way on a channel (CHAN_SES_WINDOW_DEFAULT in its channels.h),
which is 100 MB/s at 20 ms and 20 at 100, whatever the link carries. So a large upload opens its
file once more on each of a few further channels. A name may have become another file's by then:
before anything is written the first handle gives the file a time that nobody else does, and a
handle that does not show it is not used.

Old content is overwritten through one channel: an attempt that breaks off must leave a beginning of
the new content (upload_resume.py), and several channels don't keep one order.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass

from asyncssh import SFTPAttrs
from asyncssh.constants import FXF_WRITE

from hpcfs.model.errors import RemoteError
from hpcfs.remotes.sftp.path import SftpPath
from hpcfs.remotes.sftp.requests import Requests

log = logging.getLogger(__name__)

WIDE_BYTES = 8 * 1024 * 1024
"""Smaller uploads are not worth the three round trips that further channels cost."""


@dataclass(eq=False)
class WriteChannel:
    """A handle on a channel, and how many bytes are under way on it."""

    requests: Requests
    handle: bytes
    under_way: int = 0

    async def write(self, offset: int, data: bytes) -> None:
        """Write bytes at an offset. Raises asyncssh's errors."""
        self.under_way += len(data)
        try:
            await self.requests.write(self.handle, offset, data)
        finally:
            self.under_way -= len(data)


class ParallelChannels:
    """The channels over which one open file is written; `first` is the handle that completes it."""

    def __init__(self, place: SftpPath, first: bytes) -> None:
        self._place = place
        self._first = WriteChannel(place.session.bulk, first)
        self._others: list[WriteChannel] = []
        self._widening: asyncio.Task[None] | None = None

    async def for_writing(self, length: int) -> list[WriteChannel]:
        """The channels for `length` bytes. Nothing may be written before the first call returns."""
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
        opened = WriteChannel(channel, await channel.kept(opening))
        if (await channel.fstat(opened.handle, 0)).mtime == mark:
            self._others.append(opened)
        else:
            channel.close_soon(opened.handle)

    async def close_others(self) -> None:
        """Close the further handles after everything was written. Raises what the server
        reports."""
        others, self._others = self._others, []
        await asyncio.gather(*(one.requests.close(one.handle) for one in others))

    async def give_up(self) -> None:
        """Close the further handles after a failure, which is reported already; returns once the
        server is through with what was sent on them."""
        others, self._others = self._others, []
        closing = [one.requests.close(one.handle) for one in others if not one.requests.ended]
        for failed in await asyncio.gather(*closing, return_exceptions=True):
            if isinstance(failed, Exception):
                log.debug("after a failure of %s, another one: %s", self._place, failed)

    def close_soon(self) -> None:
        """Close the further handles without waiting."""
        others, self._others = self._others, []
        for one in others:
            one.requests.close_soon(one.handle)
