"""One SFTP channel of a mount: bytes in, bytes out.

The protocol is asyncssh's (SFTPServerHandler: version 3, draft-ietf-secsh-filexfer-02, with
OpenSSH's extensions). It takes one request after the other, so that answers keep the order of what
was asked: by that a mount knows that a file was not changed between a read and the fstat after
it.

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

from hpcfs.laptop.memory import Held
from hpcfs.laptop.sftp_server import ShareFile, Shares, ShareServer

log = logging.getLogger(__name__)

SFTP_VERSION = 3
HANDLE_BYTES = 8
MAX_LISTINGS = 1000
"""Directories open on one channel."""
BREATH_SECONDS = 0.02
_NOT_SERVED = {FXP_LINK, FXP_BLOCK, FXP_UNBLOCK, b"ranges@asyncssh.com", b"copy-data"}
"""What asyncssh answers and no mount asks for. Its copy of a file to itself never ends."""

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
"""errno_to_portable in OpenSSH's sftp-server.c: what clients have learned to understand. Only EROFS
is a "failure" there; statvfs tells it from EACCES."""
_BAD_MESSAGE = "Bad message"
"""Its words for it, by which remotes/sftp/translate.py knows."""


class HandleTable(dict[bytes, object]):
    """Of one mount, by handle."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = itertools.count(1)

    def new_handle(self) -> bytes:
        return next(self._numbers).to_bytes(HANDLE_BYTES, "big")

    def close(self, server: ShareServer) -> None:
        files = list(self.values())
        self.clear()
        for file in files:
            assert isinstance(file, ShareFile)
            server.close(file)


class ServerChannel:
    """Feed `received` what comes and call `ended` when nothing more will; `run` answers.

    `untaken` says how many bytes of answers the mount has not taken. Where they are more than
    `most`, or those of all mounts are too many, no request is begun until a call of `taken` finds
    half of it.
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
        self._held = Held(shares.memory, most)
        self._reader = _RequestReader(self._held)
        self._handler = _Handler(
            ShareServer(shares), self._reader, _AnswerWriter(self._answer), files
        )

    def received(self, data: bytes | memoryview) -> None:
        self._reader.feed(data)

    def ended(self) -> None:
        """What came and was not begun is left: who asked has given it up, and may be asking anew
        elsewhere."""
        self._reader.end()

    def taken(self) -> None:
        if not self._reader.over and self._held.answers(self._untaken(), resuming=True):
            self._reader.may_go.set()

    def _answer(self, data: bytes) -> None:
        self._write(data)
        if not self._reader.over and not self._held.answers(self._untaken()):
            self._reader.may_go.clear()

    async def run(self) -> None:
        """Until the other end is gone, or makes no sense."""
        with suppress(EOFError):
            await self._handler.run()
        self._reader.end()


class _RequestReader:
    """Of a reader, what asyncssh's handler uses."""

    def __init__(self, held: Held) -> None:
        self._stream = asyncio.StreamReader()
        self._held = held
        self._waiting = 0
        self.may_go = asyncio.Event()
        self.may_go.set()
        self.over = False

    def feed(self, data: bytes | memoryview) -> None:
        if self.over:
            return
        self._waiting += len(data)
        if not self._held.requests(self._waiting):
            log.warning("a mount asks for more than it can be answered: its channel is closed")
            self.end()
        else:
            self._stream.feed_data(cast(bytes, data))

    def end(self) -> None:
        if not self.over:
            self.over = True
            self._held.close()
            self._stream.feed_eof()
            self.may_go.set()

    @property
    def logger(self) -> SSHLogger:
        return asyncssh_logger

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """A symlink request has its paths in OpenSSH's order, not the draft's, as all clients that
        know OpenSSH send them."""
        return "OpenSSH" if name == "client_version" else default

    async def readexactly(self, count: int) -> bytes:
        """Raises EOFError."""
        await self.may_go.wait()
        if self.over:
            raise EOFError
        found = await self._stream.readexactly(count)
        self._waiting -= count
        if not self.over:
            self._held.requests(self._waiting)
        return found


class _AnswerWriter:
    """Of a writer, what asyncssh's handler uses."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self.write = write
        self._closed = False

    @property
    def channel(self) -> _AnswerWriter:
        return self

    def is_closing(self) -> bool:
        return self._closed

    def close(self) -> None:
        self._closed = True


class _Handler(SFTPServerHandler):
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
        """Counts on every channel of the mount."""
        assert isinstance(self._file_handles, HandleTable)
        return self._file_handles.new_handle()

    async def _process_opendir(self, packet: SSHPacket) -> bytes:
        """asyncssh's looks at the directory when its names are asked for."""
        path = packet.get_string()
        if len(self._dir_handles) >= MAX_LISTINGS:
            raise OSError(errno.EMFILE, "too many directories are open through the tunnel")
        self._shares.check_directory(path)
        handle = self._get_next_handle()
        self._dir_handles[handle] = self._shares.scandir(path)
        return handle

    async def _process_packet(self, pkttype: int, pktid: int, packet: SSHPacket) -> None:
        """Nothing else runs while one request after the other is here already and needs no wait."""
        now = time.monotonic()
        if now - self._breathed_at > BREATH_SECONDS:
            await asyncio.sleep(0)
            self._breathed_at = time.monotonic()
        await super()._process_packet(pkttype, pktid, packet)

    async def _cleanup(self, exc: Exception | None) -> None:
        """The files are the mount's, not this channel's: who ends the mount closes them."""
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
