"""Bounds the bytes of a site that are under way at once, and says whose turn is next.

SFTP servers answer in the order of the requests, and what was asked for can't be taken back. So a
piece waits here, not in the server's queue, until there is room: what a program waits for goes
first and may exceed the limit a little, and what nobody wants any more was never asked for. Among
the others the earlier fetch goes first with all its pieces: fetches that took turns would all end
late.

The limit follows the link: what was asked for and does not travel yet waits in the server. OpenSSH
holds up to 16 MiB of it for a channel, and once that is full moves all of them in memory for each
32 KiB (measured at 20 ms: 5 CPU seconds per GB instead of 1.2). So latencies are watched: where an
answer took longer than the quickest did, the difference was spent waiting, and tells how much.
"""

from __future__ import annotations

import math

from hpcfs.remotes.admission import AdmissionQueue
from hpcfs.remotes.rate import UNLIMITED, RateLimit

FIRST_BYTES = 4 * 1024 * 1024
LEAST_BYTES = 2 * 1024 * 1024
MOST_BYTES = 32 * 1024 * 1024
"""1 Gbit/s for 250 ms; also how many bytes this process may hold for the caller."""
FEW_WAITING_BYTES = 3 * 1024 * 1024
"""While fewer wait in the server, the link may carry more."""
MANY_WAITING_BYTES = 6 * 1024 * 1024
SLOWLY = 8
"""The limit changes by this part of what arrives once it was too high: it takes a round trip to
see what a change did. Until then it doubles with each round trip."""
URGENT_BYTES = 4 * 1024 * 1024
"""So much more where a program waits. More than any piece: so no other one fits while an urgent one
waits."""
_URGENT, _OTHERS = range(2)
"""Lanes."""


class Depth:
    """Finds how many bytes should be under way: the link full, and little waiting in the server."""

    def __init__(self) -> None:
        self.limit = FIRST_BYTES
        self._quickest = math.inf
        self._part = 1

    def restart(self) -> None:
        """Nothing is under way: the next answer waits for no other, and the way may be new."""
        self._quickest = math.inf
        self._part = 1

    def arrived(self, size: int, seconds: float, beside: int, *, full: bool) -> None:
        """An answer took `seconds`, asked for when `beside` bytes were under way; `full` says that
        others waited to be asked for."""
        self._quickest = min(self._quickest, seconds)
        waiting = beside * (1 - self._quickest / seconds) if seconds > 0 else 0
        if waiting > MANY_WAITING_BYTES:
            self._part = SLOWLY
            self.limit = max(LEAST_BYTES, self.limit - size // SLOWLY)
        elif waiting < FEW_WAITING_BYTES and full:
            self.limit = min(MOST_BYTES, self.limit + size // self._part)


class Flow:
    """Admits reads or writes of a site by their bytes. Sizes are in bytes.

    The limit is `fixed`, or follows the link; requests for which a program waits (urgent ones) may
    exceed it by `urgent`. None goes faster than `rate`.
    """

    def __init__(
        self,
        fixed: int | None = None,
        urgent: int = URGENT_BYTES,
        rate: RateLimit = UNLIMITED,
    ) -> None:
        self._fixed = fixed
        self._urgent = urgent
        self._depth = Depth()
        self._admission = AdmissionQueue(self, lanes=2, rate=rate)
        self.under_way = 0

    def turn(self) -> int:
        """Return a turn, which whoever has several pieces takes once for all of them."""
        return self._admission.turn()

    async def enter(self, size: int, turn: int, *, urgent: bool = False) -> None:
        """Wait until `size` more bytes may be asked for; `leave` has to follow."""
        await self._admission.enter(_URGENT if urgent else _OTHERS, size, turn)

    def leave(self, size: int) -> None:
        """Give the room of a piece back: it is here, or nobody wants it any more."""
        self._admission.leave(size)

    @property
    def limit(self) -> int:
        """How many bytes may be under way, urgent ones apart."""
        return self._depth.limit if self._fixed is None else self._fixed

    @property
    def is_awaited(self) -> bool:
        """Whether a piece waits to be asked for."""
        return self._admission.is_awaited

    def arrived(self, size: int, seconds: float, beside: int) -> None:
        """Note, before leaving, how long an answer took that was asked for when `beside` bytes
        were under way."""
        self._depth.arrived(size, seconds, beside, full=self.is_awaited)

    # --- Capacity -------------------------------------------------------------------------------

    def fits(self, lane: int, size: int) -> bool:
        """Whether `size` more bytes may be under way; a single piece always may."""
        limit = self.limit + self._urgent if lane == _URGENT else self.limit
        return self.under_way + size <= limit or not self.under_way

    def took(self, size: int) -> None:
        """Count bytes that are asked for."""
        self.under_way += size

    def gave_back(self, size: int) -> None:
        """Count bytes that are here, or not wanted any more."""
        self.under_way -= size
        if not self.under_way:
            self._depth.restart()
