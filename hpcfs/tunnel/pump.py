"""Adapts a tunnel's stream to a socket, since asyncssh speaks only over sockets.

Used at both ends of a tunnel's TCP forward.
"""

from __future__ import annotations

import asyncio
import socket
from typing import cast

from hpcfs.tunnel.stream import TunnelStream

WAITING_BYTES = 8 * 1024 * 1024
"""Bytes that may wait on either side before their source is paused: more than a round trip of 60 ms
carries at 1 Gbit/s."""


class Pump(asyncio.Protocol):
    """Copies bytes between a stream and our end of a socket pair."""

    def __init__(self, stream: TunnelStream) -> None:
        self._stream = stream
        self._paused = False
        stream.on_acknowledged.append(self._seen)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start copying from the stream to the socket."""
        self._transport = cast(asyncio.Transport, transport)
        self._stream.listen(self._to_socket, self._ended)

    def data_received(self, data: bytes) -> None:
        """Write to the stream; pause the socket when too much is unacknowledged."""
        self._stream.write(data)
        if self._stream.unacknowledged > WAITING_BYTES and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Close the stream."""
        self._stream.close()

    def _seen(self) -> None:
        if self._paused and self._stream.unacknowledged < WAITING_BYTES // 2:
            self._paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()

    def _to_socket(self, data: memoryview) -> None:
        if not self._transport.is_closing():
            # Copied: the transport may keep it, and the buffer is used again.
            self._transport.write(bytes(data))

    def _ended(self, reason: str) -> None:
        self._transport.abort()


async def socket_of(stream: TunnelStream) -> socket.socket:
    """Return a socket for asyncssh that carries the stream, from which nothing was read yet."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    try:
        await asyncio.get_running_loop().create_connection(lambda: Pump(stream), sock=ours)
    except BaseException:
        ours.close()
        theirs.close()
        raise
    return theirs
