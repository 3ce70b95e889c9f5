"""Decides whether the cache's disk keeps up with the fetched data. Pure policy, no I/O.

A fetch first waits for the remote, then for the disk. The number of bytes in flight is bounded, so
they queue at the bottleneck. Where fetches wait longer for the disk than for the remote, and the
disk is busy most of the time, readers wait for the disk. The exception is a disk that is so fast
that memory would be no better, which happens with a server on this machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable

BUSY_SECONDS = 1.0
"""Seconds that the disk must have been busy before it is judged."""
_SPELL_SECONDS = 4.0
FAST_RATE = 150e6
"""Bytes per second that no slow disk reaches: more than a link of 1 Gbit/s delivers."""
PAUSE_SECONDS = 30.0
"""Seconds for which a slow disk is left alone before it is tried again."""
MAX_PAUSE_SECONDS = 300.0
"""The longest such pause, after the disk was slow again and again."""


class SlowDisk:
    """The verdict on one mount's disk. `now` is a monotonic clock in seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._began = self._last = now()
        self._busy = self._fetching = self._storing = 0.0
        self._bytes = 0
        self._slow_until = self._began
        self._pause = 0.0

    @property
    def is_slow(self) -> bool:
        """Whether the disk is to be left alone now."""
        return self._now() < self._slow_until

    def stored(self, length: int, fetch_seconds: float, store_seconds: float) -> bool:
        """Report a fetch of `length` bytes that just ended, and how many seconds it waited for the
        remote and for the disk. Returns whether this shows that the disk is slow."""
        now = self._now()
        if now < self._slow_until:
            return False  # the fetch began before
        busy = min(store_seconds, now - self._last)  # several are stored at once
        if now - self._began > _SPELL_SECONDS and self._busy < (now - self._began) / 2:
            self._begin(now - busy)
        self._last = now
        self._busy += busy
        self._fetching += fetch_seconds
        self._storing += store_seconds
        self._bytes += length
        if self._busy < max(BUSY_SECONDS, (now - self._began) / 2):
            return False
        is_slow = self._storing > self._fetching and self._bytes < FAST_RATE * self._busy
        if is_slow:
            again = self._pause > 0 and now - self._slow_until < PAUSE_SECONDS
            self._pause = min(2 * self._pause, MAX_PAUSE_SECONDS) if again else PAUSE_SECONDS
            self._slow_until = now + self._pause
        self._begin(now)
        return is_slow

    def _begin(self, now: float) -> None:
        self._began = now
        self._busy = self._fetching = self._storing = 0.0
        self._bytes = 0
