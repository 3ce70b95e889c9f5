"""Runs a ProxyCommand as the way to a host: as ssh runs it, by the user's shell.

The socket pair at its stdin and stdout is the connection. With ProxyUseFdpass it hands a connected
socket over that, and ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from dataclasses import dataclass

from hpcfs.model.errors import Unreachable, WrongSettings
from hpcfs.remotes.ssh.program import Program
from hpcfs.remotes.ssh.settings import Hop

log = logging.getLogger(__name__)

_DEFAULT_SHELL = "/bin/sh"


@dataclass
class Proxy:
    """`socket` belongs to whoever connects over it."""

    socket: socket.socket
    _program: Program
    _ending: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, hop: Hop) -> Proxy:
        """Start the command. Raises WrongSettings and Unreachable. The caller's clock bounds it."""
        assert hop.proxy_command is not None
        shell = os.environ.get("SHELL") or _DEFAULT_SHELL
        try:
            line = [shell, "-c", f"exec {hop.proxy_command}"]
            program = await Program.start("ProxyCommand", line)
        except OSError as error:
            raise WrongSettings(
                f"{shell} for the ProxyCommand of {hop.alias} can't be started: {error.strerror}"
            ) from error
        if not hop.passes_socket:
            return cls(program.socket, program)
        try:
            with program.socket:
                return cls(await _received(program.socket, hop), program)
        except BaseException:
            await program.close()
            raise

    async def last_words(self) -> str:
        """Return what the command wrote on stderr, once the connection through it broke."""
        _, lines = await self._program.last_words()
        return "; ".join(lines[-3:])

    def end(self) -> None:
        """The connection is over; so is the command, as with ssh."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._program.close())

    async def close(self) -> None:
        """End the ProxyCommand."""
        self.end()
        assert self._ending is not None
        await asyncio.wait([self._ending])


async def _received(ours: socket.socket, hop: Hop) -> socket.socket:
    """The socket that the command passes."""
    loop = asyncio.get_running_loop()
    ours.setblocking(False)
    readable = asyncio.Event()
    loop.add_reader(ours, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(ours)
    _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    if not descriptors:
        raise Unreachable(f"the ProxyCommand of {hop.alias} passed no connection (ProxyUseFdpass)")
    return socket.socket(fileno=descriptors[0])
