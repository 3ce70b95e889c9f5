"""Who came to the tunnel and has something to prove: each has little time, and they are few.

Others can reach the port of a tunnel on a login node, and flood it. Where too many have yet to
prove something, the one who has been here longest goes: a mount needs one round trip.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

SECONDS = 10.0
TOLD_EVERY_SECONDS = 60.0
"""A line of the log for each of a flood would fill the disk."""

T = TypeVar("T")


class Strangers(Generic[T]):
    """At most so many at once. `expel` gets whom time or others drove out, with the reason."""

    def __init__(self, most: int, expel: Callable[[T, str], None]) -> None:
        self._most = most
        self._expel = expel
        self._waiting: dict[T, asyncio.TimerHandle] = {}
        """In the order in which they came."""

    def __contains__(self, one: T) -> bool:
        return one in self._waiting

    def all(self) -> list[T]:
        return list(self._waiting)

    def add(self, one: T) -> None:
        if len(self._waiting) >= self._most:
            self._drive_out(next(iter(self._waiting)), "too many connections prove nothing")
        loop = asyncio.get_running_loop()
        reason = "it has not proved who it is"
        self._waiting[one] = loop.call_later(SECONDS, self._drive_out, one, reason)

    def remove(self, one: T) -> bool:
        """Whether it was here."""
        timer = self._waiting.pop(one, None)
        if timer is None:
            return False
        timer.cancel()
        return True

    def _drive_out(self, one: T, reason: str) -> None:
        if self.remove(one):
            self._expel(one, reason)


class Admission:
    """So many a second may come in, and a crowd of that many at once. Who is turned away before
    anything is made for it costs a fraction; a mount tries again at once, so that it is soon among
    those who are not."""

    def __init__(self, rate: float) -> None:
        self._rate = self._left = rate
        self._at = time.monotonic()

    def admits(self) -> bool:
        now = time.monotonic()
        self._left = min(self._left + (now - self._at) * self._rate, self._rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Tally:
    """Counts what happens to strangers, and logs it now and then."""

    def __init__(self) -> None:
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None

    def note(self) -> None:
        """The first one is logged at once, what comes in the next minute at its end."""
        self._count += 1
        if self._timer is None:
            self._tell()
            self._timer = asyncio.get_running_loop().call_later(TOLD_EVERY_SECONDS, self._again)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._tell()

    def _again(self) -> None:
        self._timer = None
        self._tell()

    def _tell(self) -> None:
        if self._count:
            log.warning("strangers at the tunnel's port, sent away: %d", self._count)
        self._count = 0
