"""Connections that still have something to prove: limited in time and in number.

Other users can reach a tunnel's port on a login node, and flood it. Where too many connections have
yet to prove something, the oldest one is closed: a mount needs just one round trip.
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
"""Seconds between two lines of the log: one for each connection of a flood would fill the disk."""

T = TypeVar("T")


class Strangers(Generic[T]):
    """Holds at most `most` items. `expel` gets each item that is removed by time or by others, with
    the reason."""

    def __init__(self, most: int, expel: Callable[[T, str], None]) -> None:
        self._most = most
        self._expel = expel
        self._waiting: dict[T, asyncio.TimerHandle] = {}
        """The items by age, the oldest first."""

    def __contains__(self, one: T) -> bool:
        return one in self._waiting

    def all(self) -> list[T]:
        """Return all items, the oldest first."""
        return list(self._waiting)

    def add(self, one: T) -> None:
        """Add an item, which may expel the oldest one."""
        if len(self._waiting) >= self._most:
            self._remove_and_expel(next(iter(self._waiting)), "too many connections prove nothing")
        loop = asyncio.get_running_loop()
        reason = "it has not proved who it is"
        self._waiting[one] = loop.call_later(SECONDS, self._remove_and_expel, one, reason)

    def remove(self, one: T) -> bool:
        """Remove an item; return whether it was there."""
        timer = self._waiting.pop(one, None)
        if timer is None:
            return False
        timer.cancel()
        return True

    def _remove_and_expel(self, one: T, reason: str) -> None:
        if self.remove(one):
            self._expel(one, reason)


class Admission:
    """A token bucket: admits `rate` items a second, and as many in a burst.

    Refusing a connection before anything is made for it costs little. A mount retries at once, so
    it is soon among the admitted ones.
    """

    def __init__(self, rate: float) -> None:
        self._rate = self._left = rate
        self._at = time.monotonic()

    def admits(self) -> bool:
        """Return whether another item is admitted now."""
        now = time.monotonic()
        self._left = min(self._left + (now - self._at) * self._rate, self._rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Tally:
    """Counts rejected strangers, and logs the number from time to time."""

    def __init__(self) -> None:
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None

    def note(self) -> None:
        """Count one. The first one is logged at once, those of the next minute together at its
        end."""
        self._count += 1
        if self._timer is None:
            self._log_count()
            self._timer = asyncio.get_running_loop().call_later(TOLD_EVERY_SECONDS, self._again)

    def close(self) -> None:
        """Stop the timer, and log the rest."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._log_count()

    def _again(self) -> None:
        self._timer = None
        self._log_count()

    def _log_count(self) -> None:
        if self._count:
            log.warning("strangers at the tunnel's port, sent away: %d", self._count)
        self._count = 0
