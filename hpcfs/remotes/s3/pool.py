"""The HTTP connections to one host.

A connection is made only when there is more to ask than there are idle connections, so their number
follows what is asked; request_gate.py bounds most of that, and the pool all of it. What changes
objects may take minutes: it leaves connections to what reads, and both leave some to looks.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohappyeyeballs

from hpcfs.remotes import life
from hpcfs.remotes.admission import AdmissionQueue
from hpcfs.remotes.s3.http import (
    REPORT_SECONDS,
    ConnectionLost,
    HttpConnection,
    HttpRequest,
    HttpResponse,
)

IDLE_SECONDS = 30.0
"""Many servers close idle connections earlier, which is noticed; routers forget them in silence,
but only after minutes."""
TICK_SECONDS = 1.0
SECOND_ADDRESS_SECONDS = 0.25
"""When an address does not answer, the next one is tried beside it (RFC 8305)."""
ATTEMPT_SECONDS = 3.0
"""For one attempt to connect. The system asks again after 1, 3, 7, 15 s: a new attempt finds a link
that is back sooner."""
LOOKUP_SECONDS = 2.0
"""For the host's addresses, where they are known from before."""
DEAD_SECONDS = 15
"""Without a sign of life of the other side's system, a connection is dead."""
KEEPALIVE_SECONDS = 5
_DEATH = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_SECONDS),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, DEAD_SECONDS // KEEPALIVE_SECONDS),
)
"""By which the system ends a connection whose other side is gone while it holds nothing (tcp(7)).
For what it holds there is HttpConnection.check: TCP_USER_TIMEOUT would end uploads to whoever takes
bytes slowly through a small window."""
UNWATCHED_SECONDS = 60
"""TCP_USER_TIMEOUT where no HttpConnection watches: enough for those that are slow."""
RESERVED = 4
"""Connections, at most, that what changes objects leaves to what reads, and that to looks."""
_LOOKS, _READS, _CHANGES = range(3)
"""Lanes."""


class NotOpened(OSError):
    """No connection could be made, and none had taken the request: nothing was sent."""


@dataclass(frozen=True)
class HostAddress:
    """The host and port of a pool's connections. `tls` is None for plain HTTP."""

    name: str
    port: int
    tls: ssl.SSLContext | None

    def __str__(self) -> str:
        scheme = "https" if self.tls else "http"
        name = f"[{self.name}]" if ":" in self.name else self.name
        return f"{scheme}://{name}:{self.port}"


def new_socket(address: Any) -> socket.socket:
    """Return a socket for an address in the form of `getaddrinfo`, by which a dead link is noticed
    within DEAD_SECONDS."""
    family, kind, protocol, _, _ = address
    sock = socket.socket(family, kind, protocol)
    for option in _DEATH:
        sock.setsockopt(*option)
    return sock


def new_unwatched_socket(address: Any) -> socket.socket:
    """Return a socket for whoever waits without an end for its bytes to be taken."""
    sock = new_socket(address)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNWATCHED_SECONDS * 1000)
    return sock


class HostLookup:
    """The addresses of a host: as they are now, or as they were last where the answer takes too
    long. One question at a time, which holds a thread until it is answered."""

    def __init__(self, name: str, port: int) -> None:
        self._name, self._port = name, port
        self._known: Any = None
        self._asking: asyncio.Task[Any] | None = None

    async def addresses(self) -> Any:
        """Return them in the form of `getaddrinfo`. Raises OSError where none was ever known."""
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask())
            self._asking.add_done_callback(self._answered)
        asking = asyncio.shield(self._asking)
        if self._known is None:
            return await asking
        with suppress(OSError):  # TimeoutError is one
            return await asyncio.wait_for(asking, LOOKUP_SECONDS)
        return self._known

    async def _ask(self) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.getaddrinfo(self._name, self._port, type=socket.SOCK_STREAM)

    def _answered(self, asking: asyncio.Task[Any]) -> None:
        self._asking = None
        if not asking.cancelled() and asking.exception() is None:
            self._known = asking.result()

    def close(self) -> None:
        """Wait for no answer any more."""
        if self._asking is not None:
            self._asking.cancel()


@dataclass(frozen=True)
class PoolLimits:
    """How long a connection may take to come about, in seconds, and how many there may be."""

    connect_timeout: float
    connections: int = 96


class _Shares:
    """Who may take how many connections of a pool: an admission.Capacity, to which the size of a
    request is its lane. Looks go first, so one connection at least is left for the others."""

    def __init__(self, connections: int) -> None:
        self._all = connections
        self._reserved = min(RESERVED, -(-connections // 4))
        self._taken = [0, 0, 0]

    def fits(self, lane: int, size: int) -> bool:
        """Whether a request of this lane may go."""
        looks, reads, changes = self._taken
        if looks + reads + changes >= self._all:
            return False
        if lane != _CHANGES and looks + reads >= max(1, self._all - 1):
            return False
        if lane == _LOOKS:
            return looks < max(1, self._all - 2)
        if reads + changes >= max(1, self._all - self._reserved):
            return False
        return lane == _READS or changes < max(1, self._all - 2 * self._reserved)

    def took(self, size: int) -> None:
        """Count a request that goes."""
        self._taken[size] += 1

    def gave_back(self, size: int) -> None:
        """Count a request that has ended."""
        self._taken[size] -= 1


class Pool:
    """`answered_in` is told how long a HEAD took."""

    def __init__(
        self, host: HostAddress, limits: PoolLimits, answered_in: Callable[[float], None]
    ) -> None:
        self.host = host
        self._answered_in = answered_in
        self._connect_timeout = limits.connect_timeout
        self._admission = AdmissionQueue(_Shares(limits.connections), lanes=3)
        self._waiting: list[life.Report] = []
        """Of the requests that wait for room."""
        self._told = 0.0
        """When they were told that the server is there."""
        self._lookup = HostLookup(host.name, host.port)
        self._all: set[HttpConnection] = set()
        self._idle: list[HttpConnection] = []
        self._ticker: asyncio.TimerHandle | None = None
        self._closed = False

    def __len__(self) -> int:
        """Connections that are open."""
        return len(self._all)

    @property
    def secure(self) -> bool:
        """Whether it is TLS that is spoken."""
        return self.host.tls is not None

    async def ask(self, request: HttpRequest) -> HttpResponse:
        """Send a request over a connection, and return the response.

        Raises UnusualResponse, ConnectionLost, NotOpened and TimeoutError, which says that the
        request was sent.
        """
        lane = _lane(request)
        self._waiting.append(request.alive)
        try:
            await self._admission.enter(lane, lane)
        finally:
            self._waiting.remove(request.alive)
        try:
            return await self._ask_over_some(request)
        finally:
            self._admission.leave(lane)

    async def _ask_over_some(self, request: HttpRequest) -> HttpResponse:
        was_sent = False
        while self._idle:
            connection = self._idle.pop()
            try:
                return await self._ask(connection, request)
            except ConnectionLost:
                # The server may have closed it just now, as it may close an idle one at any
                # time. All the idle ones are as old: the next to try is a new one.
                if connection.began:
                    raise
                was_sent = was_sent or connection.was_asked
                self.drop_idle()
        try:
            connection = await self._connect()
        except OSError as error:
            kind = ConnectionLost if was_sent else NotOpened
            raise kind(_reason(error)) from error
        return await self._ask(connection, request)

    async def _ask(self, connection: HttpConnection, request: HttpRequest) -> HttpResponse:
        response = await connection.ask(request)
        if request.bodiless:
            self._answered_in(connection.heard - connection.asked)
        if connection.reusable and not self._closed:
            self._idle.append(connection)
        return response

    async def _connect(self) -> HttpConnection:
        if self._closed:
            raise ConnectionLost("the connections are closed")
        loop = asyncio.get_running_loop()
        host = self.host
        async with asyncio.timeout(self._connect_timeout):
            sock = await self._connected()
            try:
                _, connection = await loop.create_connection(
                    lambda: HttpConnection(self._all.discard),
                    sock=sock,
                    ssl=host.tls,
                    server_hostname=host.name if host.tls else None,
                )
            except BaseException:
                sock.close()
                raise
        self._all.add(connection)
        if self._ticker is None:
            self._ticker = loop.call_later(TICK_SECONDS, self._tick)
        return connection

    async def _connected(self) -> socket.socket:
        while True:
            addresses = await self._lookup.addresses()
            with suppress(TimeoutError):
                async with asyncio.timeout(ATTEMPT_SECONDS):
                    return await aiohappyeyeballs.start_connection(
                        addresses,
                        happy_eyeballs_delay=SECOND_ADDRESS_SECONDS,
                        socket_factory=new_socket,
                    )

    def _tick(self) -> None:
        """Ends what is idle, and what has waited too long for a byte: then those that are idle may
        be as dead."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in list(self._all):
            if connection.check():
                self.drop_idle()
            elif not connection.busy and now - connection.heard > IDLE_SECONDS:
                connection.abort()
        self._idle = [connection for connection in self._idle if connection.reusable]
        self._tell_those_who_wait(now)
        self._ticker = loop.call_later(TICK_SECONDS, self._tick) if self._all else None

    def _tell_those_who_wait(self, now: float) -> None:
        """Report life to what waits for room, as long as those that have it show some."""
        last = max((connection.sign_of_life for connection in self._all), default=0.0)
        if now - self._told > REPORT_SECONDS and last > self._told:
            self._told = now
            for report in self._waiting:
                report()

    def drop_idle(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.abort()
        self._idle.clear()

    def close(self) -> None:
        """Close all connections."""
        self._closed = True
        for connection in list(self._all):
            connection.abort()
        self._idle.clear()
        self._lookup.close()
        if self._ticker is not None:
            self._ticker.cancel()


def _lane(request: HttpRequest) -> int:
    if request.urgent:
        return _LOOKS
    return _READS if request.data.startswith((b"GET ", b"HEAD ")) else _CHANGES


def _reason(error: OSError) -> str:
    """Return why there is no connection: TimeoutError has no words of its own."""
    return error.strerror or str(error) or "nothing answers"
