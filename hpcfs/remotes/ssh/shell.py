"""A shell on the server, in a channel of its own: for what SFTP can't be asked.

What is sent to it is a script on its standard input, whatever the user's login shell is: a command
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
    def write(self, script: bytes) -> None: ...

    async def read_line(self) -> bytes:
        """Empty once the shell has ended. Raises asyncssh's errors, OSError and ValueError."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class ChannelShell:
    process: asyncssh.SSHClientProcess[bytes]

    @classmethod
    async def start(cls, connection: asyncssh.SSHClientConnection) -> ChannelShell:
        """Raises asyncssh's errors and OSError."""
        return cls(await connection.create_process(COMMAND, encoding=None, stderr=asyncssh.DEVNULL))

    def write(self, script: bytes) -> None:
        self.process.stdin.write(script)

    async def read_line(self) -> bytes:
        return await self.process.stdout.readline()

    def close(self) -> None:
        self.process.close()


@dataclass(frozen=True)
class StreamShell:
    """At the other end of a child `ssh`."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def write(self, script: bytes) -> None:
        self.writer.write(script)

    async def read_line(self) -> bytes:
        return await self.reader.readline()

    def close(self) -> None:
        self.writer.close()


def quoted(path: bytes) -> bytes:
    """One word for sh, whatever bytes it has."""
    return b"'" + path.replace(b"'", b"'\\''") + b"'"
