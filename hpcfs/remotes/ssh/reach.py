"""Makes a TCP connection to a host whose name may have several addresses.

Login nodes share a name, and one of them may be down. So the addresses are tried side by side, each
a moment after the one before it (RFC 8305), each with a clock of its own. One that takes the
connection and then says nothing, as a node does that hangs, is not reached: SSH servers speak first
(RFC 4253, 4.2), so the first byte decides. Of a single address nothing is expected that the login
would not wait for anyway.

The kernel repeats a packet that was lost later and later: a link that is back after 8 s is noticed
after 15. So while an address does not answer, one attempt after the other is begun beside it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import aiohappyeyeballs

NEXT_ADDRESS_SECONDS = 0.25
MOST_ADDRESSES = 16
AGAIN_SECONDS = 2.0
"""The kernel sends one packet at the beginning of an attempt and one a second later."""
MOST_ATTEMPTS = 5
"""At one address, at a time: the oldest makes room."""

AddressInfo = tuple[int, int, int, str, Any]
"""As getaddrinfo(3) gives it."""


class NoneAnswers(Exception):
    """Raised when none of several addresses answers; says what became of each."""


@dataclass(frozen=True)
class Destination:
    """A host to connect to. `family` is a socket.AF_; `local` an address of ours to come from."""

    name: str
    port: int
    family: int = socket.AF_UNSPEC
    local: str | None = None


async def reach(
    host: Destination, seconds: float, only: AddressInfo | None = None
) -> socket.socket:
    """Return a connected socket; each address has so many seconds. With `only`, no other is tried.

    Raises OSError (TimeoutError, socket.gaierror) where there is one address, or NoneAnswers.
    """
    async with asyncio.timeout(seconds):
        addresses = [only] if only else await _resolve(host.name, host.port, host.family)
        local = await _resolve(host.local, 0, host.family) if host.local else None
    if len(addresses) > 1:
        return await _race(addresses, local, seconds)
    async with asyncio.timeout(seconds):
        return await _dial(addresses[0], local)


def address_of(sock: socket.socket) -> AddressInfo:
    """Return where a connected socket leads: for another connection to the same node."""
    return sock.family, sock.type, sock.proto, "", sock.getpeername()


async def _resolve(name: str, port: int, family: int) -> list[AddressInfo]:
    """The resolver's order, with the families in turn (RFC 8305, 4)."""
    found = await asyncio.get_running_loop().getaddrinfo(
        name, port, family=family, type=socket.SOCK_STREAM
    )
    first = [one for one in found if one[0] == found[0][0]]
    others = [one for one in found if one[0] != found[0][0]]
    mixed = chain.from_iterable(zip_longest(first, others))
    return list(dict.fromkeys(one for one in mixed if one is not None))[:MOST_ADDRESSES]


async def _race(
    addresses: Sequence[AddressInfo], local: Sequence[AddressInfo] | None, seconds: float
) -> socket.socket:
    """The socket of the first that greets."""
    to_begin = list(addresses)
    racing: dict[asyncio.Task[socket.socket], AddressInfo] = {}
    failures: dict[str, str] = {}
    try:
        while to_begin or racing:
            if to_begin:
                address = to_begin.pop(0)
                racing[asyncio.create_task(_greeted(address, local, seconds))] = address
            ended, _ = await asyncio.wait(
                racing,
                timeout=NEXT_ADDRESS_SECONDS if to_begin else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in ended:
                error = task.exception()
                if error is None:
                    del racing[task]
                    return task.result()
                failures[str(racing.pop(task)[4][0])] = _reason(error, seconds)
    finally:
        await _end(racing)
    raise NoneAnswers(", ".join(f"{name} ({reason})" for name, reason in failures.items()))


async def _dial(address: AddressInfo, local: Sequence[AddressInfo] | None) -> socket.socket:
    """Connect to one address, for as long as the caller's clock lets it."""
    dialling: list[asyncio.Task[socket.socket]] = []
    try:
        while True:
            if len(dialling) == MOST_ATTEMPTS:
                await _end([dialling.pop(0)])
            dialling.append(
                asyncio.create_task(
                    aiohappyeyeballs.start_connection([address], local_addr_infos=local)
                )
            )
            ended, _ = await asyncio.wait(
                dialling, timeout=AGAIN_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            if ended:
                first = ended.pop()
                dialling.remove(first)
                return first.result()
    finally:
        await _end(dialling)


async def _end(racing: Iterable[asyncio.Task[socket.socket]]) -> None:
    racing = list(racing)
    for task in racing:
        task.cancel()
    for result in await asyncio.gather(*racing, return_exceptions=True):
        if isinstance(result, socket.socket):
            result.close()


async def _greeted(
    address: AddressInfo, local: Sequence[AddressInfo] | None, seconds: float
) -> socket.socket:
    sock: socket.socket | None = None
    try:
        async with asyncio.timeout(seconds):
            sock = await _dial(address, local)
            await _first_byte(sock)
    except BaseException:
        if sock is not None:
            sock.close()
        raise
    return sock


async def _first_byte(sock: socket.socket) -> None:
    """Waits for it, and leaves it where it is."""
    loop = asyncio.get_running_loop()
    while True:
        readable = asyncio.Event()
        loop.add_reader(sock, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(sock)
        with suppress(BlockingIOError):
            if sock.recv(1, socket.MSG_PEEK):
                return
            raise ConnectionAbortedError("it ended the connection at once")


def _reason(error: BaseException, seconds: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {seconds:g} s"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
