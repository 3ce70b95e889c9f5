"""The laptop's end of a tunnel without an ssh between: what mounts would reach through a forward
listens here itself, and can be cut, or fall silent."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar, cast

from hpcfs.laptop.acceptor import EndpointKind, Incoming
from hpcfs.laptop.connected_mounts import ConnectedMounts
from hpcfs.laptop.identity import TunnelIdentity
from hpcfs.laptop.sftp_server import Shares
from hpcfs.laptop.shares import Share
from hpcfs.model.sites import SftpRoot, SiteSpec, TunnelSite
from hpcfs.tunnel import file
from hpcfs.tunnel.file import Endpoint, Rendezvous, TcpEndpoint, UnixEndpoint
from tests.support.sshd import LOCAL_GID, LOCAL_UID

T = TypeVar("T")
NAME = "lap"
WAIT_SECONDS = 20.0


class _SocketPipe:
    """As laptop/forwards.py's: what can't be sent when it is closed is dropped."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.write = transport.write
        self.close = transport.abort


class Forwarded(asyncio.Protocol):
    """A connection that came through the forward."""

    def __init__(self, laptop: Laptop) -> None:
        self._laptop = laptop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._laptop.connections.add(self)
        self._incoming: Incoming | None = None
        if not self._laptop.silent:
            self._incoming = self._laptop.acceptor.pipe(
                _SocketPipe(self.transport), self._laptop.kind
            )

    def data_received(self, data: bytes) -> None:
        if self._incoming is not None and not self._laptop.silent:
            self._incoming.received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._laptop.connections.discard(self)
        if self._incoming is not None:
            self._incoming.lost()


class Laptop:
    """Runs in a thread, on a loop of its own. `home` is the cluster's home directory."""

    def __init__(self, home: Path, shares: Sequence[Share], kind: EndpointKind = "unix") -> None:
        self.kind = kind
        self.directory = home / file.DIRECTORY
        self.directory.mkdir(parents=True, exist_ok=True)
        for place in (self.directory, self.directory.parent):
            place.chmod(0o700)
        self.identity = TunnelIdentity()
        self.connections: set[Forwarded] = set()
        self.silent = False
        self.shares = shares
        self._servers: list[asyncio.AbstractServer] = []
        self._place: Endpoint | None = None
        self._number = 0
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)

    def start(self) -> None:
        self._thread.start()
        self.call(self._begin)
        self.listen()

    def stop(self) -> None:
        self.deafen()
        closing = asyncio.run_coroutine_threadsafe(self.mounts.close(), self.loop)
        closing.result(WAIT_SECONDS)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT_SECONDS)
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()
        self.served.close()

    def _begin(self) -> None:
        self.served = Shares(self.shares)
        self.mounts = ConnectedMounts(self.served, self.identity, lambda: None)
        self.acceptor = self.mounts.acceptor

    def call(self, function: Callable[[], T]) -> T:
        """In the laptop's thread."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(function())
            except BaseException as error:
                done.set_exception(error)

        self.loop.call_soon_threadsafe(run)
        return done.result(WAIT_SECONDS)

    def listen(self, *, publish: bool = True) -> None:
        """Somewhere else each time, as a forward after a reconnection is."""
        self._number += 1
        future = asyncio.run_coroutine_threadsafe(self._listen(), self.loop)
        self._place = future.result(WAIT_SECONDS)
        if publish:
            self.publish()

    async def _listen(self) -> Endpoint:
        loop = asyncio.get_running_loop()
        if self.kind == "unix":
            path = str(self.directory / f"{NAME}-{self._number}.sock")
            self._servers.append(await loop.create_unix_server(lambda: Forwarded(self), path))
            return UnixEndpoint(path)
        server = await loop.create_server(lambda: Forwarded(self), "127.0.0.1", 0)
        self._servers.append(server)
        return TcpEndpoint("127.0.0.1", server.sockets[0].getsockname()[1])

    def deafen(self) -> None:
        """The forward is gone with all its connections."""

        def close() -> None:
            while self._servers:
                self._servers.pop().close()
            self._cut()

        self.call(close)

    def cut(self) -> None:
        """All connections break; the forward stays."""
        self.call(self._cut)

    def _cut(self) -> None:
        for connection in list(self.connections):
            connection.transport.abort()

    def publish(self, **changes: Any) -> None:
        assert self._place is not None
        values: dict[str, Any] = {
            "id": self.identity.id,
            "secret": self.identity.secret,
            "name": NAME,
            "laptop": "laptop.example",
            "user": getpass.getuser(),
            "login_host": socket.gethostname(),
            "since": "2026-11-25 10:00 UTC",
            "places": [self._place],
            "host_key": self.identity.host_key_line,
            "client_key": self.identity.client_key_text,
        }
        written = self.directory / ".new"
        written.touch(mode=0o600)
        written.write_bytes(file.encode(Rendezvous(**(values | changes))))
        os.replace(written, self.directory / file.file_name(NAME))

    def withdraw(self) -> None:
        (self.directory / file.file_name(NAME)).unlink()

    def site_spec(self, path: str, cache: Path) -> SiteSpec:
        return SiteSpec(
            site=TunnelSite(NAME, str(self.directory)),
            roots={"ns": SftpRoot(path)},
            state_dir=str(cache),
            uid=LOCAL_UID,
            gid=LOCAL_GID,
        )


@contextlib.contextmanager
def laptop(home: Path, *shares: Share, kind: EndpointKind = "unix") -> Iterator[Laptop]:
    running = Laptop(home, shares, kind)
    running.start()
    try:
        yield running
    finally:
        running.stop()
