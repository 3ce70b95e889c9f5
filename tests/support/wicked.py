"""An SFTP server that says what it likes: our own one (laptop/channel.py) behind asyncssh, each of
whose answers goes through `twist` before it is sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncssh
import msgspec

from hpcfs.laptop.channel import HandleTable, ServerChannel
from hpcfs.laptop.sftp_server import Shares
from hpcfs.laptop.shares import Share
from hpcfs.model.sites import SftpRoot, SiteSpec
from tests.support.evil_sftp import Login, _site
from tests.support.sshd import LOOPBACK, write_key

VERSION, STATUS, EXTENDED, EXTENDED_REPLY = 2, 101, 200, 201
INIT = 1

Twist = Callable[[int, bytes], bytes]
"""Gets the kind of the request and the answer, both as a packet with its length; what is sent."""


def packet(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def string(content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + content


def status(answer: bytes, code: int, words: bytes = b"") -> bytes:
    """In the place of this answer."""
    return packet(
        bytes([STATUS]) + answer[5:9] + code.to_bytes(4, "big") + string(words) + string(b"")
    )


class Packets:
    """Out of a stream of bytes."""

    def __init__(self) -> None:
        self._came = bytearray()

    def of(self, data: bytes) -> list[bytes]:
        self._came += data
        found = []
        while len(self._came) >= 4:
            end = 4 + int.from_bytes(self._came[:4], "big")
            if len(self._came) < end:
                break
            found.append(bytes(self._came[:end]))
            del self._came[:end]
        return found


class _Session(asyncssh.SSHServerSession[bytes]):
    def __init__(self, shares: Shares, twist: Twist) -> None:
        self._shares = shares
        self._twist = twist
        self._asked, self._answered = Packets(), Packets()
        self._kinds: dict[bytes, int] = {}

    def connection_made(self, chan: Any) -> None:
        self._chan = chan

    def subsystem_requested(self, subsystem: str) -> bool:
        return subsystem == "sftp"

    def session_started(self) -> None:
        self._served = ServerChannel(self._shares, HandleTable(), self._answer, lambda: 0, 2**30)
        self._running = asyncio.create_task(self._served.run())

    def data_received(self, data: bytes, datatype: int | None) -> None:
        for asked in self._asked.of(data):
            self._kinds[asked[5:9]] = asked[4]
            self._served.received(asked)

    def _answer(self, data: bytes) -> None:
        for answer in self._answered.of(data):
            kind = INIT if answer[4] == VERSION else self._kinds.pop(answer[5:9], 0)
            if not self._chan.is_closing():
                self._chan.write(self._twist(kind, answer))

    def connection_lost(self, exc: Exception | None) -> None:
        self._served.ended()


class Wicked:
    """`start` reaches it; it serves `directory`."""

    def __init__(self, directory: Path, twist: Twist) -> None:
        self.directory = directory
        self._twist = twist
        self.shares = Shares([Share("data", directory)])
        self.connections: list[asyncssh.SSHServerConnection] = []
        self.spec: SiteSpec

    def server(self) -> asyncssh.SSHServer:
        wicked = self

        class Server(asyncssh.SSHServer):
            def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
                wicked.connections.append(conn)

            def begin_auth(self, username: str) -> bool:
                return False

            def session_requested(self) -> Any:
                return _Session(wicked.shares, wicked._twist)

        return Server()

    def hang_up(self) -> None:
        while self.connections:
            self.connections.pop().abort()


@asynccontextmanager
async def wicked_server(base: Path, twist: Twist) -> AsyncIterator[Wicked]:
    directory = base / "served"
    directory.mkdir(parents=True)
    wicked = Wicked(directory, twist)
    host_key = write_key(base / "host_key")
    acceptor = await asyncssh.listen(
        LOOPBACK,
        0,
        server_host_keys=[str(host_key)],
        server_factory=wicked.server,
        encoding=None,
        line_editor=False,
    )
    site = _site(base, directory, host_key, acceptor.get_port(), Login(), lambda spec: spec)
    wicked.spec = msgspec.structs.replace(site.spec, roots={"ns": SftpRoot("/data")})
    try:
        yield wicked
    finally:
        wicked.hang_up()
        acceptor.close()
        await acceptor.wait_closed()
        wicked.shares.close()
