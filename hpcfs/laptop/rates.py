"""Bytes a second, over the last few seconds."""

from __future__ import annotations

from collections import deque

SECONDS = 3


class Rate:
    """Give it the total once a second."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=SECONDS + 1)

    def note(self, now: float, total: int) -> None:
        self._samples.append((now, total))

    def now(self) -> float:
        if len(self._samples) < 2:
            return 0.0
        (began, first), (ended, last) = self._samples[0], self._samples[-1]
        return (last - first) / (ended - began) if ended > began else 0.0
