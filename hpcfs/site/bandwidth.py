"""Bandwidth and delay of the link to a site, estimated from the transfers: pure, no I/O.

The method is BBR's (Cardwell et al., draft-cardwell-iccrg-bbr-congestion-control): the rate is the
largest delivery rate of the last seconds, measured over each fetch as what arrived of all fetches
while it was under way; the round trip is the shortest answer to a small request. A fetch that was
alone, or limited by the reader, delivers less than the link could: such samples do no harm to a
maximum.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

MIN_WINDOW_BYTES = 1024 * 1024
MAX_WINDOW_BYTES = 48 * 1024 * 1024
FIRST_WINDOW_BYTES = 8 * 1024 * 1024
"""Before anything is known: a megabyte takes 80 ms at 100 Mbit/s."""
_SMALLEST_FETCH = 256 * 1024
_LARGEST_FETCH = 4 * 1024 * 1024
_ROUND_TRIPS = 2
"""In the window: one under way and one for the next request to be made in time."""
_EXTRA_SECONDS = 0.05
"""In the window beside the round trips: what a reader, a server or a disk may pause."""
_RATE_SECONDS = 10.0
_DELAY_SECONDS = 60.0
_FEWEST_BYTES = 128 * 1024
"""Smaller fetches tell more of the delay than of the rate."""


class _Extreme:
    """The largest of what was seen in the last one to two periods."""

    def __init__(self, period: float) -> None:
        self._period = period
        self._began = 0.0
        self._now: float | None = None
        self._before: float | None = None

    def add(self, value: float, now: float) -> None:
        if now - self._began > self._period:
            self._before = self._now if now - self._began < 2 * self._period else None
            self._now, self._began = None, now
        self._now = value if self._now is None else max(self._now, value)

    @property
    def value(self) -> float | None:
        seen = [value for value in (self._now, self._before) if value is not None]
        return max(seen, default=None)


@dataclass(frozen=True)
class Mark:
    """When a fetch began, in seconds, and how many bytes had been delivered by then."""

    seconds: float
    delivered: int


class Bandwidth:
    """Estimates what a site's link carries. `now` is a monotonic clock in seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self._delivered = 0
        self._rates = _Extreme(_RATE_SECONDS)
        self._quickness = _Extreme(_DELAY_SECONDS)
        """Max filter over 1 / RTT, i.e. the minimum RTT."""
        self.window = FIRST_WINDOW_BYTES
        """Bytes to have under way so that the link is never idle."""
        self.fetch_bytes = _fetch_bytes(self.window)
        """The largest worthwhile request: an eighth of the window, so that a reader of its first
        block does not wait for all of it."""

    def begin(self) -> Mark:
        """Note that a fetch is sent; return the mark to give to `delivered`."""
        return Mark(self.now(), self._delivered)

    def delivered(self, mark: Mark, length: int) -> None:
        """Note that the fetch that began at `mark` brought `length` bytes."""
        self._delivered += length
        now = self.now()
        if length >= _FEWEST_BYTES and now > mark.seconds:
            self._rates.add((self._delivered - mark.delivered) / (now - mark.seconds), now)
            self._set_window()

    def answered(self, seconds: float) -> None:
        """Note that a small request took so many seconds."""
        if seconds > 0:
            self._quickness.add(1 / seconds, self.now())
            self._set_window()

    def _set_window(self) -> None:
        if self.rate is not None:
            wanted = self.rate * (_ROUND_TRIPS * (self.delay or 0.0) + _EXTRA_SECONDS)
            self.window = int(min(MAX_WINDOW_BYTES, max(MIN_WINDOW_BYTES, wanted)))
            self.fetch_bytes = _fetch_bytes(self.window)

    @property
    def rate(self) -> float | None:
        """Bytes per second, None before the first transfer."""
        return self._rates.value

    @property
    def delay(self) -> float | None:
        """Seconds of a round trip, None before the first answer."""
        quickness = self._quickness.value
        return None if quickness is None else 1 / quickness


def _fetch_bytes(window: int) -> int:
    return min(_LARGEST_FETCH, max(_SMALLEST_FETCH, window // 8))
