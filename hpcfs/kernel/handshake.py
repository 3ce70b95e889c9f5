"""The first message between kernel and daemon (FUSE_INIT), in which they agree on limits.

The kernel lets 12 requests be under way that no program waits for directly (reads ahead, closes),
and what one namespace holds of these places the others lack. libfuse could ask for more, but
pyfuse3 has no setting for it. So libfuse's answer to the first message passes through here: it
goes into a socket, its limits are replaced, and from then on libfuse has the kernel's own device
under the same descriptor. The formats are those of linux/fuse.h.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

MAX_BACKGROUND = 4096
"""Requests of one mount that the kernel may have under way without a program that waits for each.
Of other users than root it takes `max_user_bgreq` at most, which goes by the machine's memory."""
_USERS_LIMIT = Path("/sys/module/fuse/parameters/max_user_bgreq")
_CAUTIOUS_LIMIT = 512
"""Where the kernel does not tell: that of a machine with 1.5 GiB."""
_DEVICE = os.makedev(10, 229)  # /dev/fuse in Documentation/admin-guide/devices.txt
_FIRST_MESSAGE_BYTES = 8192  # FUSE_MIN_READ_BUFFER
_LIMITS = struct.Struct("=HH")
"""max_background and congestion_threshold, of struct fuse_init_out."""
_LIMITS_AT = 16 + 16
"""After struct fuse_out_header, and four numbers of 4 bytes."""


def most_background() -> int:
    """Return how many such requests the kernel will allow this user."""
    try:
        limit = int(_USERS_LIMIT.read_text())
    except (OSError, ValueError):
        limit = _CAUTIOUS_LIMIT
    return min(MAX_BACKGROUND, limit)


def with_limits(answer: bytes) -> bytes:
    """Return libfuse's answer to FUSE_INIT with our limits. One that is too short is an error, and
    stays as it is."""
    if len(answer) < _LIMITS_AT + _LIMITS.size:
        return answer
    limits = _LIMITS.pack(MAX_BACKGROUND, MAX_BACKGROUND)
    return answer[:_LIMITS_AT] + limits + answer[_LIMITS_AT + _LIMITS.size :]


def opened_device(mount: Callable[[], None]) -> int:
    """Return the descriptor of /dev/fuse that `mount` opens. Raises RuntimeError where it can't be
    told."""
    before = _devices()
    mount()
    opened = _devices() - before
    if len(opened) != 1:
        raise RuntimeError(f"libfuse opened {len(opened)} devices")
    return opened.pop()


def _devices() -> set[int]:
    return {number for number in map(int, os.listdir("/proc/self/fd")) if _is_device(number)}


def _is_device(number: int) -> bool:
    try:
        found = os.fstat(number)
    except OSError:  # that of the listing itself
        return False
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == _DEVICE


class Handshake:
    """Stands between the kernel and libfuse, which has `device`, for the first message.

    Made after the mount, before libfuse reads.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        self._kernel = os.dup(device)
        self._libfuse, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._libfuse.setblocking(False)
        os.dup2(theirs.fileno(), device, inheritable=False)
        theirs.close()

    async def carry_out(self, serve: Callable[[], Awaitable[None]]) -> None:
        """Pass the kernel's message to libfuse, and the answer back with our limits. `serve` has
        libfuse read; it is ended then, as it may still wait for the socket. What was unmounted
        meanwhile is found out by the next one.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            try:
                await self._exchange()
            except OSError as error:
                if error.errno != errno.ENODEV:  # unmounted
                    raise
            finally:
                trio.lowlevel.notify_closing(self._device)
                os.dup2(self._kernel, self._device, inheritable=False)
                os.close(self._kernel)
                self._libfuse.close()
            nursery.cancel_scope.cancel()

    async def _exchange(self) -> None:
        await trio.lowlevel.wait_readable(self._kernel)
        self._libfuse.send(os.read(self._kernel, _FIRST_MESSAGE_BYTES))
        await trio.lowlevel.wait_readable(self._libfuse)
        os.write(self._kernel, with_limits(self._libfuse.recv(_FIRST_MESSAGE_BYTES)))
