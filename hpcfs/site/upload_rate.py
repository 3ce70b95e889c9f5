"""How much was uploaded, and how fast it goes now."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

SECONDS = 5.0
"""What "now" means."""


class UploadRate:
    """Counts bytes; `now` is any clock in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.total = 0
        self._recent: deque[tuple[float, int]] = deque()

    def add(self, count: int) -> None:
        now = self._now()
        self.total += count
        if self._recent and now - self._recent[-1][0] < SECONDS / 20:
            at, before = self._recent.pop()
            self._recent.append((at, before + count))
        else:
            self._recent.append((now, count))
        self._forget(now)

    def rate(self) -> float:
        """Bytes per second, over the last seconds."""
        self._forget(self._now())
        return sum(count for _, count in self._recent) / SECONDS

    def _forget(self, now: float) -> None:
        while self._recent and now - self._recent[0][0] > SECONDS:
            self._recent.popleft()
