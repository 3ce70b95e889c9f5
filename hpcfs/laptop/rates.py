"""A transfer rate in bytes per second, averaged over the last few seconds."""

from __future__ import annotations

from collections import deque

SECONDS = 3


class Rate:
    """Call `note` with the total once a second."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=SECONDS + 1)

    def note(self, now: float, total: int) -> None:
        """Record the total number of bytes at this time (seconds)."""
        self._samples.append((now, total))

    def now(self) -> float:
        """Return the rate in bytes per second; 0 before the second sample."""
        if len(self._samples) < 2:
            return 0.0
        (began, first), (ended, last) = self._samples[0], self._samples[-1]
        return (last - first) / (ended - began) if ended > began else 0.0
