"""One connection to a place where a tunnel's forward listens, up to where a stream goes on.

Whoever answers there must say the tunnel's id first: after a tunnel has ended, its port may be
another program's, or the next tunnel's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import struct
from collections.abc import Coroutine
from typing import cast

from hpcfs.rendezvous.file import Place, UnixPlace
from hpcfs.rendezvous.stream import GREETING, OPENING, Garbled, Stream

PLACE_SECONDS = 3.0
"""For one place to answer: a forward on the same machine and a round trip or two to the laptop."""
MAX_GREETING_BYTES = 100
_CREDENTIALS = struct.Struct("3i")
"""struct ucred of unix(7): pid, uid, gid."""


class NoAnswer(Exception):
    """Nobody is at that place, or not the tunnel; the end of a sentence."""


class Silent(NoAnswer):
    """The forward is there and the laptop says nothing: it sleeps, or has no network."""


class PipeEnd(asyncio.Protocol):
    """Collects what the other end says first, then feeds a stream."""

    def __init__(self) -> None:
        self.broken = asyncio.Event()
        self.heard_at = 0.0
        self._loop = asyncio.get_running_loop()
        self._came = bytearray()
        self._more = asyncio.Event()
        self._stream: Stream | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.heard_at = self._loop.time()
        if self._stream is None:
            self._came += data
            self._more.set()
        else:
            self._feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.broken.set()
        self._more.set()

    def write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        """At once: the other end may take nothing any more, and what it has not got stays with the
        stream."""
        self._transport.abort()
        self.broken.set()

    async def read_until(self, end: bytes, most: int) -> bytes:
        while end not in self._came:
            if len(self._came) > most:
                raise NoAnswer("something else than a tunnel answers")
            await self._wait()
        line, _, rest = self._came.partition(end)
        self._came = bytearray(rest)
        return bytes(line)

    async def read(self, count: int) -> bytes:
        while len(self._came) < count:
            await self._wait()
        taken = bytes(self._came[:count])
        del self._came[:count]
        return taken

    async def _wait(self) -> None:
        if self.broken.is_set():
            raise NoAnswer("the connection was closed at once")
        self._more.clear()
        await self._more.wait()

    def carry(self, stream: Stream, seen: int) -> None:
        """From now on this is the stream's pipe."""
        stream.attach(self, seen)
        self._stream = stream
        rest, self._came = bytes(self._came), bytearray()
        if rest:
            self._feed(rest)

    def _feed(self, data: bytes) -> None:
        assert self._stream is not None
        try:
            self._stream.feed(data)
        except Garbled:
            self.close()


async def connect(place: Place, tunnel_id: str) -> PipeEnd:
    """A pipe on which that tunnel has greeted. Raises NoAnswer."""
    try:
        async with asyncio.timeout(PLACE_SECONDS):
            pipe = await _open(place)
    except TimeoutError:
        raise NoAnswer("it does not answer") from None
    except OSError as error:
        raise NoAnswer(error.strerror or str(error)) from None
    line = await _answer(pipe, pipe.read_until(b"\n", MAX_GREETING_BYTES))
    if line != GREETING + tunnel_id.encode():
        pipe.close()
        raise NoAnswer("something else than this tunnel answers")
    return pipe


async def _open(place: Place) -> PipeEnd:
    loop = asyncio.get_running_loop()
    if not isinstance(place, UnixPlace):
        _, pipe = await loop.create_connection(PipeEnd, place.host, place.port)
        return pipe
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


def _check_socket(path: str) -> None:
    status = os.stat(path, follow_symlinks=False)
    if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.getuid():
        raise NoAnswer(f"{path} is no socket of yours")


def _check_peer(sock: socket.socket) -> None:
    """Who listens there. What goes over it is not encrypted."""
    with contextlib.suppress(AttributeError):  # Linux only; elsewhere the file's owner must do
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(raw)
        if uid not in (os.getuid(), 0):
            raise NoAnswer("another user listens there")


async def go_on(pipe: PipeEnd, stream_id: bytes, received: int) -> tuple[bytes, int]:
    """Ask for a stream; which one it is, and how many of our bytes came. Raises NoAnswer; the pipe
    is closed then."""
    pipe.write(OPENING.pack(stream_id, received))
    found, seen = OPENING.unpack(await _answer(pipe, pipe.read(OPENING.size)))
    return found, seen


async def _answer(pipe: PipeEnd, reading: Coroutine[object, object, bytes]) -> bytes:
    """What the laptop says, in time. Raises NoAnswer; the pipe is closed then."""
    try:
        async with asyncio.timeout(PLACE_SECONDS):
            return await reading
    except TimeoutError:
        pipe.close()
        raise Silent("the laptop does not answer") from None
    except BaseException:
        pipe.close()
        raise
