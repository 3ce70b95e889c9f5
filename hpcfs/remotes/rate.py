"""A limit of the rate of transfers: a bucket of bytes that fills at the permitted rate.

Whoever moves bytes takes them from the bucket first, and waits where it is empty. Takers wait in
the order in which they came, and a taker of many bytes keeps the following ones waiting: the rate
holds over seconds, not within one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from hpcfs.remotes import life

BURST_SECONDS = 0.25
"""What an idle link may catch up with."""
TELL_SECONDS = 2.0
"""How often a call that waits here is told to be alive."""


class RateLimit:
    """`bytes_per_second` may pass; 0 means any number. `now` is in seconds and never goes back."""

    def __init__(
        self,
        bytes_per_second: int,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._rate = bytes_per_second
        self._now = now
        self._sleep = sleep
        self._free_at = 0.0
        """When all that was taken will have passed."""

    async def take(self, size: int) -> None:
        """Return when `size` bytes may pass. Who is cancelled meanwhile has taken them."""
        if not self._rate or not size:
            return
        now = self._now()
        start = max(self._free_at, now - BURST_SECONDS)
        self._free_at = start + size / self._rate
        while (left := start - self._now()) > 0:
            await self._sleep(min(left, TELL_SECONDS))
            life.report()


UNLIMITED = RateLimit(0)
