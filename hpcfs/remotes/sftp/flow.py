"""How many bytes of a site may be under way at once, and whose turn is next.

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

import asyncio
import heapq
import itertools
import math
from dataclasses import dataclass, field

FIRST_BYTES = 4 * 1024 * 1024
LEAST_BYTES = 2 * 1024 * 1024
MOST_BYTES = 32 * 1024 * 1024
"""1 Gbit/s for 250 ms; also what a transfer process may hold of bytes that are not on disk yet."""
FEW_WAITING_BYTES = 3 * 1024 * 1024
"""While fewer wait in the server, the link may carry more."""
MANY_WAITING_BYTES = 6 * 1024 * 1024
SLOWLY = 8
"""The limit changes by this part of what arrives once it was too high: it takes a round trip to
see what a change did. Until then it doubles with each round trip."""
URGENT_BYTES = 4 * 1024 * 1024
"""So much more where a program waits."""


@dataclass(order=True)
class _Waiting:
    late: bool
    turn: int
    number: int
    size: int = field(compare=False)
    admitted: asyncio.Future[None] = field(compare=False)


class Depth:
    """How many bytes should be under way: the link full, and little waiting in the server."""

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
    """With a `fixed` limit, or one that follows the link."""

    def __init__(self, fixed: int | None = None, urgent: int = URGENT_BYTES) -> None:
        self._fixed = fixed
        self._urgent = urgent
        self._depth = Depth()
        self._waiting: list[_Waiting] = []
        self._numbers = itertools.count()
        self.under_way = 0

    def turn(self) -> int:
        """To be asked for once by whoever has several pieces."""
        return next(self._numbers)

    async def enter(self, size: int, turn: int, *, urgent: bool = False) -> None:
        """Returns when `size` more bytes may be asked for; `leave` has to follow."""
        if self._fits(size, urgent) and not self._is_preceded(urgent):
            self.under_way += size
            return
        admitted = asyncio.get_running_loop().create_future()
        waiting = _Waiting(not urgent, turn, next(self._numbers), size, admitted)
        heapq.heappush(self._waiting, waiting)
        try:
            await admitted
        except asyncio.CancelledError:
            if not admitted.cancelled():  # both happened in one turn of the loop
                self.leave(size)
            else:
                self._admit()
            raise

    @property
    def limit(self) -> int:
        return self._depth.limit if self._fixed is None else self._fixed

    def leave(self, size: int) -> None:
        self.under_way -= size
        if not self.under_way:
            self._depth.restart()
        self._admit()

    def arrived(self, size: int, seconds: float, beside: int) -> None:
        """Before leaving: how long the answer took, `beside` what was under way when it was asked
        for."""
        self._depth.arrived(size, seconds, beside, full=bool(self._waiting))

    def _fits(self, size: int, urgent: bool) -> bool:
        limit = self.limit + self._urgent if urgent else self.limit
        return self.under_way + size <= limit or not self.under_way

    def _is_preceded(self, urgent: bool) -> bool:
        self._forget_cancelled()
        return bool(self._waiting) and not (urgent and self._waiting[0].late)

    def _admit(self) -> None:
        self._forget_cancelled()
        while self._waiting and self._fits(self._waiting[0].size, not self._waiting[0].late):
            next_one = heapq.heappop(self._waiting)
            self.under_way += next_one.size
            next_one.admitted.set_result(None)
            self._forget_cancelled()

    def _forget_cancelled(self) -> None:
        while self._waiting and self._waiting[0].admitted.cancelled():
            heapq.heappop(self._waiting)
