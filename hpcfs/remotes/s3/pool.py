"""The HTTP connections to one host.

A connection is made only when there is more to ask than there are idle connections, so their number
follows what is asked; request_gate.py bounds that.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohappyeyeballs

from hpcfs.remotes.s3.http import ConnectionLost, HttpConnection, HttpRequest, HttpResponse

IDLE_SECONDS = 30.0
"""Many servers close idle connections earlier, which is noticed; routers forget them in silence,
but only after minutes."""
TICK_SECONDS = 3.0
SECOND_ADDRESS_SECONDS = 0.25
"""When an address does not answer, the next one is tried beside it (RFC 8305)."""


class NotOpened(OSError):
    """No connection could be made, and none had taken the request: nothing was sent."""


@dataclass(frozen=True)
class HostAddress:
    """The host and port of a pool's connections. `tls` is None for plain HTTP."""

    name: str
    port: int
    tls: ssl.SSLContext | None


class Pool:
    """Times are in seconds: `connect_timeout` for a connection, `read_timeout` without a byte.
    `answered_in` is told how long a HEAD took."""

    def __init__(
        self,
        host: HostAddress,
        connect_timeout: float,
        read_timeout: float,
        answered_in: Callable[[float], None],
    ) -> None:
        self._host = host
        self._answered_in = answered_in
        self._connect_timeout, self._read_timeout = connect_timeout, read_timeout
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
        return self._host.tls is not None

    async def ask(self, request: HttpRequest) -> HttpResponse:
        """Send a request over a connection, and return the response.

        Raises UnusualResponse, ConnectionLost, NotOpened and TimeoutError.
        """
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
                self._drop_idle()
        try:
            connection = await self._connect()
        except TimeoutError:
            raise
        except OSError as error:
            kind = ConnectionLost if was_sent else NotOpened
            raise kind(f"no connection: {error}") from error
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
        host = self._host
        async with asyncio.timeout(self._connect_timeout):
            found: Any = await loop.getaddrinfo(host.name, host.port, type=socket.SOCK_STREAM)
            sock = await aiohappyeyeballs.start_connection(
                found, happy_eyeballs_delay=SECOND_ADDRESS_SECONDS
            )
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

    def _tick(self) -> None:
        """Ends what is idle, and what has waited too long for a byte."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in list(self._all):
            silent = now - connection.heard
            if connection.busy and silent > self._read_timeout:
                connection.expire()
            elif not connection.busy and silent > IDLE_SECONDS:
                connection.abort()
        self._idle = [connection for connection in self._idle if connection.reusable]
        self._ticker = loop.call_later(TICK_SECONDS, self._tick) if self._all else None

    def _drop_idle(self) -> None:
        for connection in self._idle:
            connection.abort()
        self._idle.clear()

    def close(self) -> None:
        """Close all connections."""
        self._closed = True
        for connection in list(self._all):
            connection.abort()
        self._idle.clear()
        if self._ticker is not None:
            self._ticker.cancel()
