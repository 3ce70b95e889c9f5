"""Back-off: how long to wait after failures in a row."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

FIRST_SECONDS = 1.0
LONGEST_SECONDS = 30.0


def pause_after(failures: int) -> float:
    """Return the seconds to wait after so many failures in a row: 1, 2, 4, 8, 16, then 30."""
    doublings = min(failures - 1, 10)  # the longest pause is reached long before
    return min(FIRST_SECONDS * 2.0**doublings, LONGEST_SECONDS)


class Backoff:
    """Counts the failures since the last success and keeps the time of the next attempt.

    `clock` is in seconds and never goes back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self.retry_at = -math.inf
        """When the next attempt is due, by the clock."""

    @property
    def is_waiting(self) -> bool:
        """Whether it is too early for another attempt."""
        return self._clock() < self.retry_at

    def failed(self) -> None:
        """Begin the next pause, twice as long as the one before."""
        self._failures += 1
        self.retry_at = self._clock() + pause_after(self._failures)

    def try_now(self) -> None:
        """End the present pause; a further failure still begins a longer one."""
        self.retry_at = -math.inf

    def succeeded(self) -> None:
        """Start over: the next failure begins the shortest pause."""
        self._failures = 0
        self.retry_at = -math.inf
