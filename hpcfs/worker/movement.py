"""Measures how many bytes move between this process and its site.

A transfer that takes its time is told from one that stalls by this. What counts is what the other
end confirmed or sent (tcp(7), TCP_INFO), of all connections of the process together; where a
connection is not TCP (a child `ssh`, a tunnel's socket), what came over its SFTP channels.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Callable

from hpcfs.model.usage import Traffic

_BYTES = struct.Struct("@QQ")
_BYTES_AT = 120
"""tcpi_bytes_acked and tcpi_bytes_received in struct tcp_info (linux/tcp.h)."""


class Movement:
    """The bytes that moved; `traffic` tells what came over channels that are not TCP."""

    def __init__(self, traffic: Callable[[], Traffic]) -> None:
        self._traffic = traffic
        self._by_socket: dict[int, int] = {}
        self._received = 0

    def take(self) -> int:
        """Return how many bytes moved since the last call, of connections that are open now."""
        before, self._by_socket = self._by_socket, _bytes_by_socket()
        by_sockets = sum(count - before.get(number, 0) for number, count in self._by_socket.items())
        received, self._received = self._received, self._traffic().received
        by_channels = self._received - (received if received <= self._received else 0)
        return max(by_sockets, by_channels)


def _bytes_by_socket() -> dict[int, int]:
    """Return the bytes of each TCP connection of this process, by the inode of its socket."""
    found: dict[int, int] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found[status.st_ino] = _bytes_of(int(name))
        except OSError:  # closed just now, or a socket of another kind
            continue
    return found


def _bytes_of(descriptor: int) -> int:
    """Return what the other end confirmed and sent. Raises OSError where it is no TCP socket."""
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_AT + _BYTES.size)
    if len(info) < _BYTES_AT + _BYTES.size:
        return 0  # an old kernel
    return sum(_BYTES.unpack_from(info, _BYTES_AT))
