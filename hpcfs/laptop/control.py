"""The answering side of a tunnel's control socket (see status.py), and the lock on its name.

The lock makes a tunnel the only one of its name on this machine.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec

from hpcfs.laptop import status
from hpcfs.laptop.status import TunnelReply, TunnelStatus
from hpcfs.model.errors import SetupError
from hpcfs.system import ownership, paths

log = logging.getLogger(__name__)

REQUEST_SECONDS = 10.0


class _Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    command: str


@contextmanager
def only_one(name: str) -> Iterator[None]:
    """Hold the lock on the tunnel's name. Raises SetupError where a tunnel of that name runs here
    already."""
    path = status.socket_path(name).with_suffix(".lock")
    paths.make_private(path.parent)
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SetupError(_holder(name)) from None
        yield
    finally:
        os.close(lock)


def _holder(name: str) -> str:
    advice = f"stop it with 'hpcfs tunnel --stop {name}', or give this one another name (--name)"
    try:
        found = status.query(name)
    except SetupError:
        return f"a tunnel named {name} runs here already and does not answer: {advice}"
    return f"a tunnel named {name} runs here already (pid {found.pid}, to {found.host}): {advice}"


@asynccontextmanager
async def answering(
    name: str, get_status: Callable[[], TunnelStatus], stop: Callable[[], None]
) -> AsyncIterator[None]:
    """Answer on the control socket until the block ends; `only_one` must be held. A client that
    asked to stop stays connected until the process ends."""
    path = status.socket_path(name)
    path.unlink(missing_ok=True)  # left by a killed process: nobody else holds the lock
    server = await asyncio.start_unix_server(_Answerer(get_status, stop).answer, sock=_bind(path))
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)


def _bind(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
    except OSError as error:
        listener.close()
        raise SetupError(f"cannot listen at {path}: {error.strerror}") from error
    return listener


class _Answerer:
    """Answers requests, one per connection."""

    def __init__(self, get_status: Callable[[], TunnelStatus], stop: Callable[[], None]) -> None:
        self._get_status = get_status
        self._stop = stop
        self._held: list[asyncio.StreamWriter] = []
        """Connections of clients that wait for our end: the kernel closes them then."""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one client, which must be this user or root."""
        if _peer(writer) not in (0, os.getuid()):
            writer.close()
            return
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                line = await reader.readline()
            reply, stops = self._reply(line)
            writer.write(msgspec.json.encode(reply) + b"\n")
            await writer.drain()
        except (OSError, ValueError) as error:  # TimeoutError too; a line without an end
            log.debug("a request over the control socket came to nothing: %s", error)
            writer.close()
            return
        if stops:
            self._held.append(writer)
            self._stop()
        else:
            writer.close()

    def _reply(self, line: bytes) -> tuple[TunnelReply, bool]:
        try:
            command = msgspec.json.decode(line, type=_Request).command
        except (msgspec.MsgspecError, RecursionError):
            command = ""
        if command not in ("status", "stop"):
            return TunnelReply(error='a request is one line of JSON: {"command": "status"}'), False
        return TunnelReply(status=self._get_status()), command == "stop"


def _peer(writer: asyncio.StreamWriter) -> int:
    return ownership.peer_uid(writer.get_extra_info("socket"))
