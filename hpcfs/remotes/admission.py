"""Admission: who may have a request under way, and who waits for room.

Waiters stand in lanes. A lane admits in the order of turns; when room is given back, the lanes are
asked in order, and each admits as long as its first waiter fits. How much fits is the business of a
`Capacity` (sftp/flow.py counts bytes, s3/request_gate.py requests and bytes). A waiter that is
cancelled leaves without a trace, also where it was admitted in the same moment.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from dataclasses import dataclass, field
from typing import Protocol

from hpcfs.remotes.rate import UNLIMITED, RateLimit


class Capacity(Protocol):
    """Decides how much may be under way. Sizes are in bytes; lane 0 is the most urgent one."""

    def fits(self, lane: int, size: int) -> bool:
        """Whether a request of this size may go now."""
        ...

    def took(self, size: int) -> None:
        """Count a request that goes."""
        ...

    def gave_back(self, size: int) -> None:
        """Count a request that has ended."""
        ...


@dataclass(order=True)
class _Waiter:
    turn: int
    number: int
    size: int = field(compare=False)
    admitted: asyncio.Future[None] = field(compare=False)


class AdmissionQueue:
    """Admits requests to a `Capacity`."""

    def __init__(self, capacity: Capacity, lanes: int, rate: RateLimit = UNLIMITED) -> None:
        self._capacity = capacity
        self._rate = rate
        self._lanes: list[list[_Waiter]] = [[] for _ in range(lanes)]
        self._numbers = itertools.count()

    @property
    def is_awaited(self) -> bool:
        """Whether anybody waits."""
        return any(self._first(lane) for lane in self._lanes)

    def turn(self) -> int:
        """Return a turn, which whoever has several requests takes once for all of them."""
        return next(self._numbers)

    async def enter(self, lane: int, size: int, turn: int | None = None) -> None:
        """Wait until a request of `size` bytes may go; `leave` has to follow, once it has ended."""
        await self._wait_for_room(lane, size, turn)
        try:
            await self._rate.take(size)
        except asyncio.CancelledError:
            self.leave(size)
            raise

    async def _wait_for_room(self, lane: int, size: int, turn: int | None) -> None:
        waiting = self._lanes[lane]
        if self._first(waiting) is None and self._capacity.fits(lane, size):
            self._capacity.took(size)
            return
        number = self.turn()
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(waiting, _Waiter(number if turn is None else turn, number, size, admitted))
        try:
            await admitted
        except asyncio.CancelledError:
            if admitted.cancelled():
                self._admit()
            else:  # both happened in one turn of the event loop
                self.leave(size)
            raise

    def leave(self, size: int) -> None:
        """Give the room of a request back."""
        self._capacity.gave_back(size)
        self._admit()

    def _admit(self) -> None:
        for lane, waiting in enumerate(self._lanes):
            while (first := self._first(waiting)) and self._capacity.fits(lane, first.size):
                heapq.heappop(waiting)
                self._capacity.took(first.size)
                first.admitted.set_result(None)

    @staticmethod
    def _first(waiting: list[_Waiter]) -> _Waiter | None:
        """Return the waiter whose turn it is; those that were cancelled are dropped."""
        while waiting and waiting[0].admitted.cancelled():
            heapq.heappop(waiting)
        return waiting[0] if waiting else None
