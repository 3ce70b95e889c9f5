"""Bounds the requests of a site that are under way at once, and says whose turn is next.

Turns are given first to what a program waits for, then to large requests, which are bounded by
their bytes and so can't take all, then to small ones.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from hpcfs.remotes.admission import AdmissionQueue
from hpcfs.remotes.rate import UNLIMITED, RateLimit
from hpcfs.remotes.s3.parts import MIB

MILLISECOND = 0.001
BULK_BYTES = 256 * 1024
"""Larger answers count as bulk."""
_URGENT, _LARGE, _SMALL = range(3)
"""Lanes."""


@dataclass(frozen=True)
class Bounds:
    """The bounds of one site: `slots` are requests that may be under way at once, each on a
    connection; `urgent_slots` come on top for what a program waits for.

    How many slots there are depends on how long the server takes for the smallest answer, which at
    a distance is the round trip: as many as ask it `per_second`, in the bounds given. S3 permits
    5500 of these per second and prefix.
    """

    fewest_slots: int = 32
    slots: int = 96
    per_second: int = 5000
    urgent_slots: int = 4
    bulk_slots: int = 16
    bulk_bytes: int = 32 * MIB


class RequestGate:
    """Admits the requests of a site, by their number and the bytes of the large ones, and none
    faster than `rate`."""

    def __init__(self, bounds: Bounds, rate: RateLimit = UNLIMITED) -> None:
        self._bounds = bounds
        self.slots = bounds.fewest_slots
        """How many requests may be under way now, urgent ones apart."""
        self._quickest = 0.0
        self._busy = self._bulk = self._bulk_bytes = 0
        self._admission = AdmissionQueue(self, lanes=3, rate=rate)

    @asynccontextmanager
    async def turn(self, size: int, *, urgent: bool) -> AsyncIterator[None]:
        """Wait for a turn, which ends with the block. The answer may bring `size` bytes."""
        lane = _URGENT if urgent else _LARGE if size > BULK_BYTES else _SMALL
        await self._admission.enter(lane, size)
        try:
            yield
        finally:
            self._admission.leave(size)

    def answered_in(self, seconds: float) -> None:
        """Note how long a small answer took. The quickest counts, but not for ever."""
        quickest = min(seconds, self._quickest * 1.01) if self._quickest else seconds
        self._quickest = max(quickest, MILLISECOND)
        wanted = int(self._quickest * self._bounds.per_second)
        self.slots = max(self._bounds.fewest_slots, min(wanted, self._bounds.slots))

    # --- Capacity -------------------------------------------------------------------------------

    def fits(self, lane: int, size: int) -> bool:
        """Whether a request may go; at least one large one always may when there is a slot."""
        bounds = self._bounds
        if lane == _URGENT:
            return self._busy < self.slots + bounds.urgent_slots
        if self._busy >= self.slots:
            return False
        if lane == _SMALL or not self._bulk:
            return True
        return self._bulk_bytes + size <= bounds.bulk_bytes and self._bulk < bounds.bulk_slots

    def took(self, size: int) -> None:
        """Count a request that is sent."""
        self._busy += 1
        if size > BULK_BYTES:
            self._bulk += 1
            self._bulk_bytes += size

    def gave_back(self, size: int) -> None:
        """Count a request that has ended."""
        self._busy -= 1
        if size > BULK_BYTES:
            self._bulk -= 1
            self._bulk_bytes -= size
