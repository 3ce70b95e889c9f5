"""Probes an endpoint on the cluster from the laptop, through the tunnel's own login.

The probe does the handshake as a mount does (tunnel/knock.py). So one probe tells whether a forward
leads to us, or whether another tunnel is alive. An impostor that only repeats a recorded greeting
is detected.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import Any, Literal

import asyncssh
from asyncssh.constants import OPEN_ADMINISTRATIVELY_PROHIBITED

from hpcfs.tunnel.file import Endpoint, UnixEndpoint
from hpcfs.tunnel.knock import MAX_GREETING_BYTES, NONCE_BYTES, SEALED_BYTES, TunnelHandshake
from hpcfs.tunnel.stream import ID_BYTES, ProtocolViolation

PROBE_SECONDS = 3.0

Answer = Literal["greets", "other", "refused", "forbidden"]
"""greets: that tunnel answers; other: something else answers, or nothing; refused: nobody listens;
forbidden: the server allows no connection from here."""


async def look(
    connection: asyncssh.SSHClientConnection, place: Endpoint, handshake: TunnelHandshake
) -> Answer:
    """Probe the endpoint. Raises asyncssh.Error and OSError where the login itself is lost."""
    listener = _Listener()
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            await _connect(connection, place, listener)
            return "greets" if await _is_ours(listener, handshake) else "other"
    except asyncssh.ChannelOpenError as error:
        return "forbidden" if error.code == OPEN_ADMINISTRATIVELY_PROHIBITED else "refused"
    except TimeoutError:
        return "other"
    finally:
        listener.close()


async def _is_ours(listener: _Listener, handshake: TunnelHandshake) -> bool:
    """Request a stream that can't exist: the answer shows whether the other end knows the
    secret."""
    try:
        nonce, ours = handshake.nonce_in(await listener.line()), secrets.token_bytes(NONCE_BYTES)
        listener.write(
            ours + handshake.seal(b"client", nonce + ours, secrets.token_bytes(ID_BYTES), 0)
        )
        handshake.unseal(b"server", nonce + ours, await listener.read(SEALED_BYTES))
    except ProtocolViolation:
        return False
    return True


async def _connect(
    connection: asyncssh.SSHClientConnection, place: Endpoint, listener: _Listener
) -> None:
    if isinstance(place, UnixEndpoint):
        await connection.create_unix_connection(lambda: listener, place.path)
    else:
        await connection.create_connection(lambda: listener, place.host, place.port)


class _Listener(asyncssh.SSHTCPSession[bytes], asyncssh.SSHUNIXSession[bytes]):
    """Buffers what the other end sends; returns less than requested where no more comes."""

    def __init__(self) -> None:
        self._heard = bytearray()
        self._more = asyncio.Event()
        self._over = False
        self._channel: Any = None

    def connection_made(self, chan: Any) -> None:
        """Remember the channel."""
        self._channel = chan

    def data_received(self, data: bytes | memoryview, datatype: int | None) -> None:
        """Buffer bytes, up to a limit."""
        if len(self._heard) < MAX_GREETING_BYTES + SEALED_BYTES:
            self._heard += data
            self._more.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that no more will come."""
        self._over = True
        self._more.set()

    async def line(self) -> bytes:
        """Return the next line without its newline; empty where none comes."""
        while (end := self._heard.find(b"\n")) < 0 and await self._may_come():
            pass
        line = bytes(self._heard[: max(end, 0)])
        del self._heard[: end + 1]
        return line

    async def read(self, count: int) -> bytes:
        """Return `count` bytes, or fewer."""
        while len(self._heard) < count and await self._may_come():
            pass
        return bytes(self._heard[:count])

    async def _may_come(self) -> bool:
        """Wait for more; return whether it is worth waiting again."""
        if self._over or len(self._heard) > MAX_GREETING_BYTES:
            return False
        self._more.clear()
        await self._more.wait()
        return True

    def write(self, data: bytes) -> None:
        """Send bytes."""
        if self._channel is not None and not self._channel.is_closing():
            self._channel.write(data)

    def close(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            self._channel.close()
