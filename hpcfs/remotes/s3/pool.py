"""Who may ask next, and over which connection.

`Gate` is the site's: it bounds requests and the bytes that they will bring, and lets those pass
for which a program waits. `Pool` holds the connections to one host. A connection is only made when
there is more to ask than there are connections, so their number follows what is asked.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohappyeyeballs

from hpcfs.remotes.s3.http import ConnectionLost, HttpConnection, HttpRequest, HttpResponse

MIB = 1024 * 1024
MILLISECOND = 0.001
BULK_BYTES = 256 * 1024
IDLE_SECONDS = 30.0
"""Many servers close idle connections earlier, which is noticed; routers forget them in silence,
but only after minutes."""
TICK_SECONDS = 3.0
SECOND_ADDRESS_SECONDS = 0.25
"""When an address does not answer, the next one is tried beside it (RFC 8305)."""


@dataclass(frozen=True)
class Bounds:
    """Of one site: `slots` are requests that may be under way at once, each on a connection;
    `urgent_slots` come on top for what a program waits for.

    How many slots there are depends on how long the server takes for the smallest answer, which at
    a distance is the round trip: as many as ask it `per_second`, in the bounds given. S3 permits
    5500 of these per second and prefix.
    """

    fewest_slots: int = 32
    slots: int = 96
    per_second: int = 5000
    urgent_slots: int = 4
    bulk_slots: int = 16
    bulk_bytes: int = 32 * MIB


@dataclass(eq=False)
class _Waiting:
    size: int
    turn: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Gate:
    """Turns are given first to what is urgent, then to bulk, which is bounded by its bytes and so
    can't take all, then to small requests."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self.slots = bounds.fewest_slots
        """How many requests may be under way now, urgent ones apart."""
        self._quickest = 0.0
        self._busy = self._bulk = self._bulk_bytes = 0
        self._urgent: deque[_Waiting] = deque()
        self._large: deque[_Waiting] = deque()
        self._small: deque[_Waiting] = deque()

    @asynccontextmanager
    async def turn(self, size: int, *, urgent: bool) -> AsyncIterator[None]:
        """`size` is how many bytes the answer may bring."""
        await self._enter(size, urgent)
        try:
            yield
        finally:
            self._leave(size)

    def answered_in(self, seconds: float) -> None:
        """How long a small answer took. The quickest counts, but not for ever."""
        quickest = min(seconds, self._quickest * 1.01) if self._quickest else seconds
        self._quickest = max(quickest, MILLISECOND)
        wanted = int(self._quickest * self._bounds.per_second)
        self.slots = max(self._bounds.fewest_slots, min(wanted, self._bounds.slots))

    async def _enter(self, size: int, urgent: bool) -> None:
        queue = self._urgent if urgent else self._large if size > BULK_BYTES else self._small
        if not queue and self._may_go(queue, size):
            self._go(size)
            return
        waiting = _Waiting(size)
        queue.append(waiting)
        try:
            await waiting.turn
        except asyncio.CancelledError:
            if not waiting.turn.cancelled():  # its turn came in the same moment
                self._leave(size)
            elif waiting in queue:
                queue.remove(waiting)
                self._wake()
            raise

    def _may_go(self, queue: deque[_Waiting], size: int) -> bool:
        bounds = self._bounds
        if queue is self._urgent:
            return self._busy < self.slots + bounds.urgent_slots
        if self._busy >= self.slots:
            return False
        if queue is self._small or not self._bulk:
            return True
        fits = self._bulk_bytes + size <= bounds.bulk_bytes
        return fits and self._bulk < bounds.bulk_slots

    def _go(self, size: int) -> None:
        self._busy += 1
        if size > BULK_BYTES:
            self._bulk += 1
            self._bulk_bytes += size

    def _leave(self, size: int) -> None:
        self._busy -= 1
        if size > BULK_BYTES:
            self._bulk -= 1
            self._bulk_bytes -= size
        self._wake()

    def _wake(self) -> None:
        for queue in (self._urgent, self._large, self._small):
            while queue and self._may_go(queue, queue[0].size):
                waiting = queue.popleft()
                if not waiting.turn.cancelled():
                    self._go(waiting.size)
                    waiting.turn.set_result(None)


@dataclass(frozen=True)
class HostAddress:
    """Where a pool's connections lead. `tls` is None for plain HTTP."""

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
        """Raises Unusual, Lost, and what connecting raises: OSError, TimeoutError."""
        while self._idle:
            connection = self._idle.pop()
            try:
                return await self._ask(connection, request)
            except ConnectionLost:
                # The server may have closed it just now, as it may close an idle one at any
                # time. All the idle ones are as old: the next to try is a new one.
                if connection.began:
                    raise
                self._drop_idle()
        return await self._ask(await self._connect(), request)

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
        self._closed = True
        for connection in list(self._all):
            connection.abort()
        self._idle.clear()
        if self._ticker is not None:
            self._ticker.cancel()
