"""Paths that are longer than servers take: 4095 bytes, the namespace's own folder included.

The kernel hands the mount one name at a time, so a path here may have the 4095 bytes that programs
may name and that folder's path besides; SFTP names everything from the top. On Linux a directory
that the server's process has open has a short name, /proc/self/fd/NUMBER, from which the rest is
named. Each SFTP channel is a process of its own, so what is found this way is asked for on one
channel. Elsewhere such paths are too long, as they are for sshfs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, replace

import asyncssh

from hpcfs.model.errors import NameTooLong
from hpcfs.remotes.sftp.path import SftpPath
from hpcfs.remotes.sftp.requests import Requests
from hpcfs.remotes.sftp.session import SftpSession
from hpcfs.remotes.sftp.translate import MAX_PATH_BYTES, shown

log = logging.getLogger(__name__)

DESCRIPTORS = b"/proc/self/fd"
MOST_REST_BYTES = 3500
"""Below the open directory: room for the names of temporary files beside it."""
MOST_OPEN = 64
IDLE_SECONDS = 600.0
"""No request goes on for so long: a descriptor whose number is in use must not become another's."""


@dataclass
class _Directory:
    """Open at `path`; `real` is that without links, `base` its name by the descriptor."""

    path: bytes
    real: bytes
    base: bytes
    handle: bytes
    used: float


class LongPaths:
    """Names the long paths of one namespace from directories that the server has open."""

    def __init__(self) -> None:
        self._above: SftpSession | None = None
        self._session: SftpSession | None = None
        self._open: list[_Directory] = []
        self._lock = asyncio.Lock()

    async def place(self, session: SftpSession, path: bytes, full: bytes) -> SftpPath:
        """Return a path that the server takes. Raises NameTooLong where it has no other name for
        it, and RemoteErrors."""
        cut = full.find(b"/", len(full) - MOST_REST_BYTES)
        prefix, rest = full[:cut], full[cut + 1 :]
        too_long = NameTooLong(f"{shown(full)[:80]}… is too long for {session.shown}")
        if len(prefix) > MAX_PATH_BYTES or cut < 0:
            raise too_long
        async with self._lock:
            here = await self._channel(session)
            directory = None
            if here is not None:
                with SftpPath(here, path, prefix).asking():
                    directory = await self._directory(here.meta, prefix)
        if here is None or directory is None:
            raise too_long
        return SftpPath(here, path, directory.base + b"/./" + rest)

    async def _channel(self, session: SftpSession) -> SftpSession | None:
        """Return a channel of its own; None where a further one would be a login, or is not
        granted."""
        if self._above is session and self._session is not None and not self._session.lost:
            return self._session
        self._above, self._session, self._open = session, None, []
        if session.open_channel is None:
            return None
        try:
            channel = await session.open_channel()
        except (asyncssh.ChannelOpenError, asyncssh.SFTPError) as error:
            log.info("%s grants no SFTP channel for long paths: %s", session.shown, error)
            return None
        self._session = replace(session, channels=[channel], open_channel=None, _more=None)
        return self._session

    async def _directory(self, channel: Requests, path: bytes) -> _Directory | None:
        """Open, and there still. None where the server tells of no descriptors."""
        for known in self._open:
            if known.path == path and await _target(channel, known.base) == known.real:
                known.used = time.monotonic()
                return known
        if not self._make_room(channel):
            return None
        handle = await channel.kept(channel.opendir(path))
        found = await _find(channel, handle, path)
        if found is None:
            channel.close_soon(handle)
            return None
        self._open.append(found)
        return found

    def _make_room(self, channel: Requests) -> bool:
        now = time.monotonic()
        for idle in [one for one in self._open if now - one.used > IDLE_SECONDS]:
            self._open.remove(idle)
            channel.close_soon(idle.handle)
        return len(self._open) < MOST_OPEN


async def _find(channel: Requests, handle: bytes, path: bytes) -> _Directory | None:
    """Find the name of the descriptor of a directory that was just opened."""
    try:
        names, _ = await channel.realpath(path)
        descriptors = await _descriptors(channel)
    except (asyncssh.SFTPNoSuchFile, asyncssh.SFTPPermissionDenied, asyncssh.SFTPFailure):
        return None
    real = names[0].filename if names else b""
    for number in sorted(descriptors):
        base = DESCRIPTORS + b"/%d" % number
        if real and await _target(channel, base) == real:
            assert isinstance(real, bytes)
            return _Directory(path, real, base, handle, time.monotonic())
    return None


async def _descriptors(channel: Requests) -> list[int]:
    handle = await channel.kept(channel.opendir(DESCRIPTORS))
    found: list[int] = []
    try:
        while True:
            found += [int(name) for name, _ in await channel.names(handle) if name.isdigit()]
    except asyncssh.SFTPEOFError:
        return found
    finally:
        channel.close_soon(handle)


async def _target(channel: Requests, base: bytes) -> bytes | None:
    """The path of the open directory as it is now: it may have been renamed or removed."""
    try:
        names, _ = await channel.readlink(base)
    except (asyncssh.SFTPNoSuchFile, asyncssh.SFTPPermissionDenied, asyncssh.SFTPFailure):
        return None
    found = names[0].filename if names else None
    return found if isinstance(found, bytes) else None
