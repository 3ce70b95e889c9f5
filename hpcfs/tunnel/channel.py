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
from collections.abc import Awaitable, Callable
from typing import Any, cast

from asyncssh import (
    SFTPBadMessage,
    SFTPError,
    SFTPFailure,
    SFTPNoSuchFile,
    SFTPOpUnsupported,
    SFTPPermissionDenied,
)
from asyncssh.constants import FXP_OPENDIR
from asyncssh.logging import SSHLogger, logger as asyncssh_logger
from asyncssh.packet import SSHPacket
from asyncssh.sftp import SFTPServerHandler

from hpcfs.tunnel.served import OpenFile, Shares, ShareServer

SFTP_VERSION = 3
HANDLE_BYTES = 8

_BY_ERRNO: dict[int, Callable[[str], SFTPError]] = {
    errno.ENOENT: SFTPNoSuchFile,
    errno.ENOTDIR: SFTPNoSuchFile,
    errno.EBADF: SFTPNoSuchFile,
    errno.ELOOP: SFTPNoSuchFile,
    errno.EPERM: SFTPPermissionDenied,
    errno.EACCES: SFTPPermissionDenied,
    errno.EFAULT: SFTPPermissionDenied,
    errno.ENAMETOOLONG: SFTPBadMessage,
    errno.EINVAL: SFTPBadMessage,
    errno.ENOSYS: SFTPOpUnsupported,
}
"""errno_to_portable in OpenSSH's sftp-server.c: what clients have learned to understand."""
_BAD_MESSAGE = "Bad message"
"""Its words for it, by which remotes/sftp/errors.py knows."""


class OpenFiles(dict[bytes, object]):
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
            assert isinstance(file, OpenFile)
            server.close(file)


class ServedChannel:
    """Feed `received` what comes and call `ended` when nothing more will; `run` answers."""

    def __init__(self, shares: Shares, files: OpenFiles, write: Callable[[bytes], None]) -> None:
        self._reader = _Reader()
        self._handler = _Handler(ShareServer(shares), self._reader, _Writer(write), files)

    def received(self, data: bytes | memoryview) -> None:
        self._reader.stream.feed_data(cast(bytes, data))

    def ended(self) -> None:
        self._reader.stream.feed_eof()

    async def run(self) -> None:
        """Until the other end is gone, or makes no sense."""
        await self._handler.run()


class _Reader:
    """Of a reader, what asyncssh's handler uses."""

    def __init__(self) -> None:
        self.stream = asyncio.StreamReader()

    @property
    def logger(self) -> SSHLogger:
        return asyncssh_logger

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """A symlink request has its paths in OpenSSH's order, not the draft's, as all clients that
        know OpenSSH send them."""
        return "OpenSSH" if name == "client_version" else default

    async def readexactly(self, count: int) -> bytes:
        return await self.stream.readexactly(count)


class _Writer:
    """Of a writer, what asyncssh's handler uses."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self.write = write
        self._closed = False

    @property
    def channel(self) -> _Writer:
        return self

    def is_closing(self) -> bool:
        return self._closed

    def close(self) -> None:
        self._closed = True


class _Handler(SFTPServerHandler):
    def __init__(
        self, server: ShareServer, reader: _Reader, writer: _Writer, files: OpenFiles
    ) -> None:
        super().__init__(server, cast(Any, reader), cast(Any, writer), SFTP_VERSION)
        self._shares = server
        self._file_handles = files
        self._packet_handlers = {
            kind: _as_openssh(handler)
            for kind, handler in SFTPServerHandler._packet_handlers.items()
            if handler is not None
        }
        self._packet_handlers[FXP_OPENDIR] = _as_openssh(_Handler._process_opendir)

    def _get_next_handle(self) -> bytes:
        """Counts on every channel of the mount."""
        assert isinstance(self._file_handles, OpenFiles)
        return self._file_handles.new_handle()

    async def _process_opendir(self, packet: SSHPacket) -> bytes:
        """asyncssh's looks at the directory when its names are asked for."""
        path = packet.get_string()
        self._shares.check_directory(path)
        handle = self._get_next_handle()
        self._dir_handles[handle] = self._shares.scandir(path)
        return handle

    async def _cleanup(self, exc: Exception | None) -> None:
        """The files are the mount's, not this channel's: who ends the mount closes them."""
        self._file_handles = OpenFiles()
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
