"""A shell on the server, in a channel of its own, for what SFTP can't be asked.

It gets scripts on its standard input, whatever the user's login shell is: a command
line would be read by that one first, and not all of them quote as sh does.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

import asyncssh

COMMAND = "exec sh"
"""Every login shell understands this, csh and fish too."""


class Shell(Protocol):
    """A POSIX shell on the server."""

    def write(self, script: bytes) -> None:
        """Send lines to the shell, without waiting."""
        ...

    async def read_line(self) -> bytes:
        """Empty once the shell has ended. Raises asyncssh's errors, OSError and ValueError."""
        ...

    def close(self) -> None:
        """End the shell."""
        ...


class _ShellSession(asyncssh.SSHClientSession[bytes]):
    """Copies what comes: receiver.py decrypts the next packet to where it lies."""

    def __init__(self) -> None:
        self.reader = asyncio.StreamReader()

    def data_received(self, data: bytes, datatype: int | None) -> None:
        if datatype is None:
            self.reader.feed_data(bytes(data))

    def eof_received(self) -> bool:
        self.reader.feed_eof()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.reader.feed_eof()


@dataclass(frozen=True)
class ChannelShell:
    """A shell in a channel of an asyncssh connection."""

    channel: asyncssh.SSHClientChannel[bytes]
    session: _ShellSession

    @classmethod
    async def start(cls, connection: asyncssh.SSHClientConnection) -> ChannelShell:
        """Start a shell. Raises asyncssh's errors and OSError."""
        channel, session = await connection.create_session(
            _ShellSession, command=COMMAND, request_pty=False, encoding=None
        )
        assert isinstance(session, _ShellSession)
        return cls(channel, session)

    def write(self, script: bytes) -> None:
        """Send lines to the shell, without waiting."""
        self.channel.write(script)

    async def read_line(self) -> bytes:
        """Return the next line with its end; b"" once the shell has ended."""
        return await self.session.reader.readline()

    def close(self) -> None:
        """End the shell."""
        self.channel.close()


@dataclass(frozen=True)
class StreamShell:
    """A shell at the other end of a child `ssh`."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def write(self, script: bytes) -> None:
        """Send lines to the shell, without waiting."""
        self.writer.write(script)

    async def read_line(self) -> bytes:
        """Return the next line with its end; b"" once the shell has ended."""
        return await self.reader.readline()

    def close(self) -> None:
        """End the shell."""
        self.writer.close()


def quoted(path: bytes) -> bytes:
    """Return a path as one word for sh, whatever bytes it has."""
    return b"'" + path.replace(b"'", b"'\\''") + b"'"
