"""Back-off: how long to wait after failures in a row."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

LONGEST_SECONDS = 30.0


@dataclass(frozen=True)
class PauseRange:
    """The pauses after one kind of failure, in seconds: each is twice as long as the one before, up
    to `longest`. The share `random_part` of a pause is drawn at random, so that many who lost the
    same server do not come back at the same moment."""

    first: float
    longest: float
    random_part: float = 0.5


UNREACHED = PauseRange(0.5, 2.0)
"""Nobody answered, so nobody is troubled by the next attempt: an outage ends for the user within a
second or two of the link's return."""
REACHED = PauseRange(1.0, LONGEST_SECONDS)
"""The server answered and something failed: it has trouble, and is asked less and less often."""
REFUSED = PauseRange(60.0, 240.0, random_part=0.0)
"""The login was refused. Sites ban who tries five times in ten minutes (fail2ban's defaults), which
these pauses never do."""
ENDED = PauseRange(120.0, 240.0, random_part=0.0)
"""The login was ended by the server once more, where an earlier one was not: the first time it may
have been the link, and another attempt follows soon. Together they are as few as those of REFUSED.
"""


def pause_after(failures: int, pauses: PauseRange = REACHED) -> float:
    """Return the longest pause, in seconds, after so many failures in a row."""
    doublings = min(failures - 1, 10)  # the longest pause is reached long before
    return min(pauses.first * 2.0**doublings, pauses.longest)


class Backoff:
    """Counts the failures since the last success and keeps the time of the next attempt.

    `clock` is in seconds and never goes back; `draw` returns a random number from 0 to 1.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._clock = clock
        self._draw = draw
        self._failures = 0
        self._pauses = REACHED
        self.retry_at = -math.inf
        """When the next attempt is due, by the clock."""

    @property
    def is_waiting(self) -> bool:
        """Whether it is too early for another attempt."""
        return self._clock() < self.retry_at

    def failed(self, pauses: PauseRange = REACHED) -> None:
        """Begin the next pause of this kind; one after a failure of another kind is the first."""
        self._failures = self._failures + 1 if pauses is self._pauses else 1
        self._pauses = pauses
        random_part = self._draw() * pauses.random_part
        self.retry_at = self._clock() + pause_after(self._failures, pauses) * (1 - random_part)

    def try_now(self) -> None:
        """End the present pause; a further failure still begins a longer one."""
        self.retry_at = -math.inf

    def succeeded(self) -> None:
        """Start over: the next failure begins the shortest pause."""
        self._failures = 0
        self.retry_at = -math.inf
