"""How many bytes of a site may be under way at once, and whose turn is next.

SFTP servers answer in the order of the requests, and what was asked for can't be taken back. So a
piece waits here, not in the server's queue, until there is room: what a program waits for goes
first and may exceed the limit a little, and what nobody wants any more was never asked for. Among
the others the earlier fetch goes first with all its pieces: fetches that took turns would all end
late.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from dataclasses import dataclass, field

BYTES_UNDER_WAY = 32 * 1024 * 1024
"""1 Gbit/s for 250 ms; also what a transfer process may hold of bytes that are not on disk yet."""
URGENT_BYTES = 4 * 1024 * 1024
"""So much more where a program waits."""


@dataclass(order=True)
class _Waiting:
    late: bool
    turn: int
    number: int
    size: int = field(compare=False)
    admitted: asyncio.Future[None] = field(compare=False)


class Flow:
    def __init__(self, limit: int = BYTES_UNDER_WAY, urgent_limit: int = URGENT_BYTES) -> None:
        self._limit = limit
        self._urgent_limit = limit + urgent_limit
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

    def leave(self, size: int) -> None:
        self.under_way -= size
        self._admit()

    def _fits(self, size: int, urgent: bool) -> bool:
        limit = self._urgent_limit if urgent else self._limit
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
