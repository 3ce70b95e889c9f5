"""What answers at a place on the cluster, found out from the laptop through its own login.

Whoever connects to a tunnel's place is greeted with the tunnel's id (rendezvous/stream.py), so that
one look tells whether a forward leads to us, or whether another tunnel is alive.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import asyncssh
from asyncssh.constants import OPEN_ADMINISTRATIVELY_PROHIBITED

from hpcfs.rendezvous.file import Place, UnixPlace
from hpcfs.rendezvous.stream import GREETING

PROBE_SECONDS = 3.0

Answer = Literal["greets", "other", "refused", "forbidden"]
"""greets: it is that tunnel; other: something else, or nothing, is said; refused: nobody listens;
forbidden: the server lets nobody connect from here."""


async def look(connection: asyncssh.SSHClientConnection, place: Place, tunnel_id: str) -> Answer:
    """Raises asyncssh.Error and OSError where the login itself is lost."""
    expected = GREETING + tunnel_id.encode() + b"\n"
    listener = _Listener(len(expected))
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            await _connect(connection, place, listener)
            said = await listener.said
    except asyncssh.ChannelOpenError as error:
        return "forbidden" if error.code == OPEN_ADMINISTRATIVELY_PROHIBITED else "refused"
    except TimeoutError:
        return "other"
    finally:
        listener.close()
    return "greets" if said == expected else "other"


async def _connect(
    connection: asyncssh.SSHClientConnection, place: Place, listener: _Listener
) -> None:
    if isinstance(place, UnixPlace):
        await connection.create_unix_connection(lambda: listener, place.path)
    else:
        await connection.create_connection(lambda: listener, place.host, place.port)


class _Listener(asyncssh.SSHTCPSession[bytes], asyncssh.SSHUNIXSession[bytes]):
    """Of what is said first, so many bytes, or fewer where no more comes."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._heard = bytearray()
        self._channel: Any = None
        self.said: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def connection_made(self, chan: Any) -> None:
        self._channel = chan

    def data_received(self, data: bytes | memoryview, datatype: int | None) -> None:
        self._heard += data
        if len(self._heard) >= self._count:
            self._done()

    def connection_lost(self, exc: Exception | None) -> None:
        self._done()

    def _done(self) -> None:
        if not self.said.done():
            self.said.set_result(bytes(self._heard[: self._count]))

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
