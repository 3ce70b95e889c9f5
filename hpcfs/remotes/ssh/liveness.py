"""Notices that the other end of an SSH connection is gone.

Asyncssh asks after every KEEPALIVE_SECONDS of silence (receiver.py tells it of whatever comes). Two
things it can't see are seen here. Bytes that leave our side show that the other one is there, too:
over a slow link, the answer to a question waits behind megabytes that are sent. And where the
machine woke up, or has another network, the question is put at once, and answered soon or never.

A login for which the user typed something is not given up as easily: TCP carries it over an outage
of minutes, and nobody may be there to type again. Meanwhile its requests wait as long as their own
deadlines let them.

The kernel's own limit for what nobody confirms (TCP_USER_TIMEOUT) is not used for 15 s: it ends
connections to whoever takes bytes slowly through a small window, though they move.

This leans on names inside of asyncssh: where one is missing, its own keepalive is all there is.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import socket
import struct
import termios
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import asyncssh
from asyncssh.channel import SSHChannel

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.5
"""Between looks at what is still to be sent."""
SENT_BYTES = 1024
"""What must have left at least: a question of ours is shorter, and a kernel takes it for a program
that hangs."""
ANSWER_SECONDS = 15.0
"""For an answer while a request waits for the server's disk."""
CHECK_SECONDS = 3.0
"""For an answer after a change of the machine or the network."""
ATTENDED_KEEPALIVES = (60, 9)
"""Of a login that the user took part in: seconds, and how many may stay without an answer."""
_TCP_RTO_MAX_MS = 44
"""linux/tcp.h, since Linux 6.15."""
REPEATED_SECONDS = 5.0
"""How often TCP repeats, at the least, what was not confirmed: by itself it doubles the time up to
two minutes, so that an outage of one minute lasts for two. More than any round trip."""
_INT = struct.Struct("i")
_NAMES = ("_transport", "_keepalive_count", "_reset_keepalive_timer", "_make_global_request")


class Liveness:
    """Watches the connections of one login: the target's, and those to jump hosts.

    `attended` says that the user took part in the login.
    """

    def __init__(
        self, connections: Sequence[asyncssh.SSHClientConnection], *, attended: bool
    ) -> None:
        self._connections: list[Any] = list(connections)
        self._attended = attended
        for connection in connections:
            if attended:
                connection.set_keepalive(*ATTENDED_KEEPALIVES)
                _come_back_soon(connection)
        is_known = all(hasattr(one, name) for one in connections for name in _NAMES)
        self._watching = asyncio.create_task(self._watch()) if is_known else None

    async def _watch(self) -> None:
        left = [0] * len(self._connections)
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            before, left = left, [_to_send(one) for one in self._connections]
            for connection, then, now in zip(self._connections, before, left, strict=True):
                if then - now > SENT_BYTES:
                    connection._reset_keepalive_timer()
                    connection._keepalive_count = 0

    async def answers(self) -> bool:
        """Ask the target for a sign of life, and return whether one comes within ANSWER_SECONDS;
        the connection stays as it is."""
        if self._watching is None:
            return False
        with suppress(TimeoutError, asyncssh.Error, OSError):
            async with asyncio.timeout(ANSWER_SECONDS):
                await _ask(self._connections[-1])
                return self._connections[-1]._transport is not None
        return False

    async def check(self, *, doubted: bool = False) -> None:
        """Ask for a sign of life now; end the connections that give none within CHECK_SECONDS. One
        that the user logged in is ended only if it is `doubted`."""
        if self._watching is not None:
            await asyncio.gather(*(self._check(one, doubted) for one in self._connections))

    async def _check(self, connection: Any, doubted: bool) -> None:
        connection._keepalive_count = max(1, connection._keepalive_count)
        with suppress(TimeoutError, asyncssh.Error, OSError):
            async with asyncio.timeout(CHECK_SECONDS):
                await _ask(connection)
                connection._keepalive_count = 0
        is_over = connection._transport is None
        if connection._keepalive_count and not is_over and (doubted or not self._attended):
            connection.connection_lost(asyncssh.ConnectionLost("no sign of life"))

    def end(self) -> None:
        """Watch no more."""
        if self._watching is not None:
            self._watching.cancel()


async def _ask(connection: Any) -> None:
    """Return once it has answered, or is over."""
    await connection._make_global_request(b"keepalive@openssh.com")


def _to_send(connection: Any) -> int:
    """Return how many bytes wait to be sent or confirmed, on the way through jump hosts too."""
    transport = connection._transport
    if transport is None or transport.is_closing():
        return 0
    waiting: int = transport.get_write_buffer_size()
    if isinstance(transport, SSHChannel):
        return waiting + _to_send(transport.get_connection())
    found = transport.get_extra_info("socket")
    if found is None:
        return waiting
    try:
        unsent = fcntl.ioctl(found.fileno(), termios.TIOCOUTQ, bytes(_INT.size))
    except OSError:  # it was closed just now
        return waiting
    return waiting + int(_INT.unpack(unsent)[0])


def _come_back_soon(connection: asyncssh.SSHClientConnection) -> None:
    """Have the kernel notice the end of an outage within REPEATED_SECONDS, and give up no sooner
    than the keepalives do. Nothing changes where the kernel can't, or the way is not TCP."""
    found = connection.get_extra_info("socket")
    if found is None:
        return
    interval, count = ATTENDED_KEEPALIVES
    limit = interval * (count + 1)
    with suppress(OSError), socket.socket(fileno=os.dup(found.fileno())) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_RTO_MAX_MS, round(REPEATED_SECONDS * 1000))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit * 1000)
