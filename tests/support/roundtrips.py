"""Counts the round trips of SFTP operations, whatever the machine's speed.

Answers are held back for a moment, as a distant server's would be, and each request is one round
trip deeper than the deepest answer that was here when it was sent. What an operation waited for is
the depth that the answers have reached at its end.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from hpcfs.remotes.sftp.requests import Requests
from hpcfs.remotes.sftp.session import SftpSession

DELAY_SECONDS = 0.01
TURNS = 30
"""Of the event loop after the delay: a busy machine may come to sending only then."""


@dataclass
class RoundTrips:
    """Since `counting` began, or the last `restart`."""

    reached: int = 0
    sent: Counter[int | bytes] = field(default_factory=Counter)
    """Requests by type, or by an extension's name."""

    def restart(self) -> None:
        self.reached = 0
        self.sent.clear()


@contextmanager
def counting(session: SftpSession) -> Iterator[RoundTrips]:
    trips = RoundTrips()
    channels = {id(channel): channel for channel in session.channels}.values()
    patches = [patch for channel in channels for patch in _watched(channel, trips)]
    for patch in patches:
        patch.start()
    try:
        yield trips
    finally:
        for patch in patches:
            patch.stop()


def _watched(channel: Requests, trips: RoundTrips) -> list[Any]:
    depths: dict[int, int] = {}
    held: deque[bytes] = deque()
    send, message, data, received = (
        channel._send_request, channel.message, channel.data, channel.received,
    )  # fmt: skip

    def send_noted(kind: int | bytes, *more: Any) -> None:
        depths[channel._next_pktid] = trips.reached + 1
        trips.sent[kind] += 1
        send(kind, *more)

    def answered(number: int) -> None:
        trips.reached = max(trips.reached, depths.pop(number, 0))

    def message_noted(content: bytes) -> None:
        answered(int.from_bytes(content[1:5], "big"))
        message(content)

    def data_noted(number: int, length: int) -> Any:
        answered(number)
        return data(number, length)

    def received_later(chunk: bytes | memoryview) -> None:
        held.append(bytes(chunk))
        asyncio.get_running_loop().call_later(DELAY_SECONDS, deliver, TURNS)

    def deliver(turns: int) -> None:
        if turns:
            asyncio.get_running_loop().call_soon(deliver, turns - 1)
        else:
            received(held.popleft())

    return [
        mock.patch.object(channel, "_send_request", send_noted),
        mock.patch.object(channel, "message", message_noted),
        mock.patch.object(channel, "data", data_noted),
        mock.patch.object(channel, "received", received_later),
    ]
