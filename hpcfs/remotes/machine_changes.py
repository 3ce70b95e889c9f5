"""Detects that the machine woke up or its network addresses or routes changed.

Then a connection that did not survive is tested at once, not when its keepalives have run out, and
a pause before the next attempt ends.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Literal

MachineChange = Literal["slept", "network"]

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
ASLEEP_SECONDS = 2.0
_GROUPS = 0x10 | 0x100 | 0x40
"""Multicast groups RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR and RTMGRP_IPV4_ROUTE of rtnetlink(7).
The routes of IPv6 are renewed by every router's advertisement, which means no change."""


def slept() -> float:
    """Return the seconds that this machine has spent suspended since it booted."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


@asynccontextmanager
async def watched(
    on_change: Callable[[MachineChange], None], how_long: Callable[[], float] = slept
) -> AsyncIterator[None]:
    """Call `on_change` for each change until the block ends. `how_long` returns the seconds spent
    suspended so far."""
    sleeping = asyncio.create_task(_watch_sleep(on_change, how_long))
    netlink = _open_netlink()
    loop = asyncio.get_running_loop()
    if netlink is not None:
        loop.add_reader(netlink, _heard, netlink, on_change)
    try:
        yield
    finally:
        if netlink is not None:
            loop.remove_reader(netlink)
            netlink.close()
        sleeping.cancel()
        await asyncio.wait([sleeping])


async def _watch_sleep(
    on_change: Callable[[MachineChange], None], how_long: Callable[[], float]
) -> None:
    before = how_long()
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        now = how_long()
        if now - before > ASLEEP_SECONDS:
            log.info("this machine slept for %.0f s", now - before)
            on_change("slept")
        before = now


def _open_netlink() -> socket.socket | None:
    found = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    try:
        found.bind((0, _GROUPS))
    except OSError as error:
        log.info("changes of the network are not told here: %s", error)
        found.close()
        return None
    return found


def _heard(netlink: socket.socket, on_change: Callable[[MachineChange], None]) -> None:
    """Drain the socket. The messages' content does not matter: one is as good as many."""
    try:
        while netlink.recv(65536):
            pass
    except BlockingIOError:
        pass
    except OSError as error:  # ENOBUFS: the kernel's queue overflowed
        log.debug("the network changes faster than it is read: %s", error)
    on_change("network")
