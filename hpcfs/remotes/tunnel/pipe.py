"""Connects to a place where a tunnel's forward listens, up to where a stream goes on.

Whoever answers there must show first that it is the tunnel (tunnel/knock.py): after one has
ended, its port may be another program's, or another user's who would like to be it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import stat
import struct
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import cast

from hpcfs.tunnel.file import Endpoint, TcpEndpoint, UnixEndpoint
from hpcfs.tunnel.knock import MAX_GREETING_BYTES, NONCE_BYTES, SEALED_BYTES, TunnelHandshake
from hpcfs.tunnel.stream import ProtocolViolation, TunnelStream

PLACE_SECONDS = 3.0
"""For one place to answer: a forward on the same machine and a round trip or two to the laptop."""
FURTHER_SECONDS = 0.25
"""A network of a cluster answers much sooner."""
_CREDENTIALS = struct.Struct("3i")
"""struct ucred of unix(7): pid, uid, gid."""


class NoAnswer(Exception):
    """Raised when nobody is at that place, or not the tunnel; the message is the end of a
    sentence."""


class Silent(NoAnswer):
    """Raised when the forward is there and the laptop says nothing: it sleeps, or has no
    network."""


class TurnedAway(NoAnswer):
    """Raised when somebody listens there and closes the connection before it says who it is: where
    strangers flood a port, that happens to mounts too."""


class PipeEnd(asyncio.Protocol):
    """Collects what the other end says first, then feeds a stream."""

    def __init__(self) -> None:
        self.broken = asyncio.Event()
        self.heard_at = 0.0
        self._loop = asyncio.get_running_loop()
        self._came = bytearray()
        self._more = asyncio.Event()
        self._stream: TunnelStream | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin (asyncio calls this)."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Collect bytes, or feed the stream (asyncio calls this)."""
        self.heard_at = self._loop.time()
        if self._stream is None:
            self._came += data
            self._more.set()
        else:
            self._feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the pipe broke (asyncio calls this)."""
        self.broken.set()
        self._more.set()

    def write(self, data: bytes) -> None:
        """Send bytes, without waiting."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        """Close at once: the other end may take nothing any more, and what it has not got stays
        with the stream."""
        self._transport.abort()
        self.broken.set()

    async def read_until(self, end: bytes, most: int) -> bytes:
        """Return the bytes before `end`. Raises NoAnswer after `most` bytes without it."""
        while end not in self._came:
            if len(self._came) > most:
                raise NoAnswer("something else than a tunnel answers")
            await self._wait()
        line, _, rest = self._came.partition(end)
        self._came = bytearray(rest)
        return bytes(line)

    async def read(self, count: int) -> bytes:
        """Return the next `count` bytes. Raises TurnedAway where the pipe breaks first."""
        while len(self._came) < count:
            await self._wait()
        taken = bytes(self._came[:count])
        del self._came[:count]
        return taken

    async def _wait(self) -> None:
        if self.broken.is_set():
            raise TurnedAway("the connection was closed at once")
        self._more.clear()
        await self._more.wait()

    def carry(self, stream: TunnelStream, seen: int) -> None:
        """Carry this stream from now on."""
        stream.attach(self, seen)
        self._stream = stream
        rest, self._came = bytes(self._came), bytearray()
        if rest:
            self._feed(rest)

    def _feed(self, data: bytes) -> None:
        assert self._stream is not None
        try:
            self._stream.feed(data)
        except ProtocolViolation:
            self.close()


@dataclass(frozen=True)
class OpenedPipe:
    """A pipe that is open. `stream_id` is zeros where the tunnel has no such stream, `seen` how
    many of our bytes have come there."""

    pipe: PipeEnd
    stream_id: bytes
    seen: int


async def connect(
    place: Endpoint, handshake: TunnelHandshake, stream_id: bytes, received: int
) -> OpenedPipe:
    """Return a pipe to that tunnel, on which the stream of that id goes on, of which `received`
    bytes have come. Raises NoAnswer."""
    try:
        async with asyncio.timeout(PLACE_SECONDS):
            pipe = await _open(place)
    except TimeoutError:
        raise NoAnswer("it does not answer") from None
    except OSError as error:
        raise NoAnswer(error.strerror or str(error)) from None
    try:
        nonce = handshake.nonce_in(await _answer(pipe.read_until(b"\n", MAX_GREETING_BYTES)))
        nonces = nonce + secrets.token_bytes(NONCE_BYTES)
        pipe.write(nonces[NONCE_BYTES:] + handshake.seal(b"client", nonces, stream_id, received))
        sealed = await _answer(pipe.read(SEALED_BYTES))
        found, seen = handshake.unseal(b"server", nonces, sealed)
    except ProtocolViolation:
        pipe.close()
        raise NoAnswer("something else than this tunnel answers") from None
    except BaseException:
        pipe.close()
        raise
    return OpenedPipe(pipe, found, seen)


async def _open(place: Endpoint) -> PipeEnd:
    loop = asyncio.get_running_loop()
    if not isinstance(place, UnixEndpoint):
        return await _open_port(place)
    _check_socket(place.path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await loop.sock_connect(sock, place.path)
        _check_peer(sock)
        _, pipe = await loop.create_unix_connection(PipeEnd, sock=sock)
    except BaseException:
        sock.close()
        raise
    return pipe


async def _open_port(place: TcpEndpoint) -> PipeEnd:
    """Connect to a port. Where strangers flood it, the system drops who comes: then a further
    connection is quicker than waiting until the first one is tried again (1 s, tcp(7)). The first
    to stand is used."""
    loop = asyncio.get_running_loop()
    trying: set[asyncio.Future[tuple[asyncio.Transport, PipeEnd]]] = set()
    done: set[asyncio.Future[tuple[asyncio.Transport, PipeEnd]]] = set()
    try:
        while not done:
            connecting = loop.create_connection(PipeEnd, place.host, place.port)
            trying.add(asyncio.ensure_future(connecting))
            done, _ = await asyncio.wait(
                trying, timeout=FURTHER_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
        first = done.pop()
        trying.remove(first)
        return first.result()[1]
    finally:
        for attempt in trying:
            attempt.cancel()
            attempt.add_done_callback(_close_unused)


def _close_unused(attempt: asyncio.Future[tuple[asyncio.Transport, PipeEnd]]) -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result()[1].close()


def _check_socket(path: str) -> None:
    status = os.stat(path, follow_symlinks=False)
    if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.getuid():
        raise NoAnswer(f"{path} is no socket of yours")


def _check_peer(sock: socket.socket) -> None:
    """Raise NoAnswer where another user listens there: what goes over it is not encrypted."""
    with contextlib.suppress(AttributeError):  # Linux only; elsewhere the file's owner must do
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(raw)
        if uid not in (os.getuid(), 0):
            raise NoAnswer("another user listens there")


async def _answer(reading: Coroutine[object, object, bytes]) -> bytes:
    """Return what the laptop says, in time. Raises NoAnswer."""
    try:
        async with asyncio.timeout(PLACE_SECONDS):
            return await reading
    except TimeoutError:
        raise Silent("the laptop does not answer") from None
