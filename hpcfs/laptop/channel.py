"""One SFTP channel of a mount: takes request bytes, writes answer bytes.

asyncssh's SFTPServerHandler implements the protocol (version 3, draft-ietf-secsh-filexfer-02, with
OpenSSH's extensions). It answers requests one after the other, in their order. A mount relies on
that order to know that a file was not changed between a read and the fstat after it.

Channels of one mount share their open files.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, cast

from asyncssh import (
    SFTPBadMessage,
    SFTPError,
    SFTPFailure,
    SFTPNoSuchFile,
    SFTPOpUnsupported,
    SFTPPermissionDenied,
)
from asyncssh.constants import FXP_BLOCK, FXP_LINK, FXP_OPENDIR, FXP_UNBLOCK
from asyncssh.logging import SSHLogger, logger as asyncssh_logger
from asyncssh.packet import SSHPacket
from asyncssh.sftp import SFTPServerHandler

from hpcfs.laptop.memory import ChannelMemory
from hpcfs.laptop.sftp_server import ShareFile, Shares, ShareServer

log = logging.getLogger(__name__)

SFTP_VERSION = 3
HANDLE_BYTES = 8
MAX_LISTINGS = 1000
"""Open directories on one channel."""
BREATH_SECONDS = 0.02
_NOT_SERVED = {FXP_LINK, FXP_BLOCK, FXP_UNBLOCK, b"ranges@asyncssh.com", b"copy-data"}
"""Requests that asyncssh implements and no mount sends. Its copy of a file to itself never ends."""

_BY_ERRNO: dict[int, Callable[[str], SFTPError]] = {
    errno.ENOENT: SFTPNoSuchFile,
    errno.ENOTDIR: SFTPNoSuchFile,
    errno.EBADF: SFTPNoSuchFile,
    errno.ELOOP: SFTPNoSuchFile,
    errno.EPERM: SFTPPermissionDenied,
    errno.EACCES: SFTPPermissionDenied,
    errno.EFAULT: SFTPPermissionDenied,
    errno.EROFS: SFTPPermissionDenied,
    errno.ENAMETOOLONG: SFTPBadMessage,
    errno.EINVAL: SFTPBadMessage,
    errno.ENOSYS: SFTPOpUnsupported,
}
"""The mapping of errno_to_portable in OpenSSH's sftp-server.c, which clients understand. Only EROFS
is a "failure" there; statvfs tells it from EACCES."""
_BAD_MESSAGE = "Bad message"
"""OpenSSH's message for that code, which remotes/sftp/translate.py looks for."""


class HandleTable(dict[bytes, object]):
    """The open files of one mount, by handle."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = itertools.count(1)

    def new_handle(self) -> bytes:
        """Return a handle that was never used before."""
        return next(self._numbers).to_bytes(HANDLE_BYTES, "big")

    def close(self, server: ShareServer) -> None:
        """Close all files."""
        files = list(self.values())
        self.clear()
        for file in files:
            assert isinstance(file, ShareFile)
            server.close(file)


class ServerChannel:
    """Answers one channel: call `received` with each piece of data and `ended` when no more will
    come; `run` answers.

    `untaken` returns how many bytes of answers the mount has not taken yet. Once they exceed
    `most`, or those of all mounts together are too many, no request is started until a call of
    `taken` finds at most half of that.
    """

    def __init__(
        self,
        shares: Shares,
        files: HandleTable,
        write: Callable[[bytes], None],
        untaken: Callable[[], int],
        most: int,
    ) -> None:
        self._write = write
        self._untaken = untaken
        self._held = ChannelMemory(shares.memory, most)
        self._reader = _RequestReader(self._held)
        self._handler = _Handler(
            ShareServer(shares), self._reader, _AnswerWriter(self._answer), files
        )

    def received(self, data: bytes | memoryview) -> None:
        """Queue the bytes of requests."""
        self._reader.feed(data)

    def ended(self) -> None:
        """End the channel. Requests that were not started are dropped: their client has given them
        up, and may have sent them again elsewhere."""
        self._reader.end()

    def taken(self) -> None:
        """Resume answering if the mount has taken enough answers."""
        if not self._reader.over and self._held.answers(self._untaken(), resuming=True):
            self._reader.may_go.set()

    def _answer(self, data: bytes) -> None:
        self._write(data)
        if not self._reader.over and not self._held.answers(self._untaken()):
            self._reader.may_go.clear()

    async def run(self) -> None:
        """Answer requests until the other end closes the channel or breaks the protocol."""
        with suppress(EOFError):
            await self._handler.run()
        self._reader.end()


class _RequestReader:
    """The part of asyncio's StreamReader that asyncssh's handler uses, with flow control."""

    def __init__(self, held: ChannelMemory) -> None:
        self._stream = asyncio.StreamReader()
        self._held = held
        self._waiting = 0
        self.may_go = asyncio.Event()
        self.may_go.set()
        self.over = False

    def feed(self, data: bytes | memoryview) -> None:
        """Queue bytes; close the channel where too many wait."""
        if self.over:
            return
        self._waiting += len(data)
        if not self._held.requests(self._waiting):
            log.warning("a mount asks for more than it can be answered: its channel is closed")
            self.end()
        else:
            self._stream.feed_data(cast(bytes, data))

    def end(self) -> None:
        """End the input: the handler sees end of file."""
        if not self.over:
            self.over = True
            self._held.close()
            self._stream.feed_eof()
            self.may_go.set()

    @property
    def logger(self) -> SSHLogger:
        """asyncssh's own logger."""
        return asyncssh_logger

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Name OpenSSH as the client's version, so that asyncssh reads a symlink request's paths in
        OpenSSH's order, not the draft's, as all clients that know OpenSSH send them."""
        return "OpenSSH" if name == "client_version" else default

    async def readexactly(self, count: int) -> bytes:
        """Read `count` bytes, once the mount has taken enough answers. Raises EOFError."""
        await self.may_go.wait()
        if self.over:
            raise EOFError
        found = await self._stream.readexactly(count)
        self._waiting -= count
        if not self.over:
            self._held.requests(self._waiting)
        return found


class _AnswerWriter:
    """The part of asyncio's StreamWriter that asyncssh's handler uses."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self.write = write
        self._closed = False

    @property
    def channel(self) -> _AnswerWriter:
        """The writer itself, which is all that the handler needs of a channel."""
        return self

    def is_closing(self) -> bool:
        """Return whether `close` was called."""
        return self._closed

    def close(self) -> None:
        """Mark the writer closed."""
        self._closed = True


class _Handler(SFTPServerHandler):
    """asyncssh's handler, restricted to what mounts ask for and with OpenSSH's error codes."""

    def __init__(
        self, server: ShareServer, reader: _RequestReader, writer: _AnswerWriter, files: HandleTable
    ) -> None:
        super().__init__(server, cast(Any, reader), cast(Any, writer), SFTP_VERSION)
        self._shares = server
        self._breathed_at = 0.0
        self._file_handles = files
        self._extensions = [
            pair for pair in SFTPServerHandler._extensions if pair[0] not in _NOT_SERVED
        ]
        self._packet_handlers = {
            kind: _as_openssh(handler)
            for kind, handler in SFTPServerHandler._packet_handlers.items()
            if handler is not None and kind not in _NOT_SERVED
        }
        self._packet_handlers[FXP_OPENDIR] = _as_openssh(_Handler._process_opendir)

    def _get_next_handle(self) -> bytes:
        """Return a handle that is unique on all channels of the mount."""
        assert isinstance(self._file_handles, HandleTable)
        return self._file_handles.new_handle()

    async def _process_opendir(self, packet: SSHPacket) -> bytes:
        """Check the directory now: asyncssh's own method checks it only when names are
        requested."""
        path = packet.get_string()
        if len(self._dir_handles) >= MAX_LISTINGS:
            raise OSError(errno.EMFILE, "too many directories are open through the tunnel")
        self._shares.check_directory(path)
        handle = self._get_next_handle()
        self._dir_handles[handle] = self._shares.scandir(path)
        return handle

    async def _process_packet(self, pkttype: int, pktid: int, packet: SSHPacket) -> None:
        """Let other tasks run now and then: nothing yields while requests are buffered and need no
        wait."""
        now = time.monotonic()
        if now - self._breathed_at > BREATH_SECONDS:
            await asyncio.sleep(0)
            self._breathed_at = time.monotonic()
        await super()._process_packet(pkttype, pktid, packet)

    async def _cleanup(self, exc: Exception | None) -> None:
        """Leave the open files alone: they belong to the mount, and are closed when it leaves."""
        self._file_handles = HandleTable()
        await super()._cleanup(exc)


Handler = Callable[..., Awaitable[object]]


def _as_openssh(handler: Handler) -> Handler:
    async def handle(*args: Any) -> object:
        try:
            return await handler(*args)
        except OSError as error:
            kind = _BY_ERRNO.get(error.errno or 0, SFTPFailure)
            words = error.strerror or "Failure"
            raise kind(_BAD_MESSAGE if kind is SFTPBadMessage else words) from error
        except (ValueError, OverflowError):  # a number that no file can have
            raise SFTPBadMessage(_BAD_MESSAGE) from None

    return handle
